"""Score the files of each day, compare them with training and report: one run a day, retried where that can help."""

import subprocess
from datetime import datetime, timedelta

from airflow.exceptions import AirflowException, AirflowFailException
from airflow.sdk import dag, task

FOLDER = "/srv/anomalies"  # with model/, incoming/, scores/, nightly.sh and score.toml


@dag(
    schedule="15 3 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": timedelta(minutes=5)},
    tags=["anomalies"],
)
def nightly_scores():
    @task
    def score(day: str) -> int:
        code = subprocess.run(["sh", f"{FOLDER}/nightly.sh", day], check=False).returncode
        if code == 3:
            raise AirflowFailException(
                f"Alert: more anomalies on {day} than expected, or drift; see the report."
            )
        if code in (1, 2):
            raise AirflowFailException(f"Wrong options or unfit files on {day} (code {code}); see the log.")
        if code not in (0, 4):
            raise AirflowException(f"Ended with code {code}; the next try goes on from there.")
        return code  # 4: done, but for the rows in the quarantine file

    # 03:15 of a day scores the day before.
    score("{{ macros.ds_add(ds, -1) }}")


nightly_scores()
