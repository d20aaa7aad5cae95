#!/bin/sh
# Score the files of a day, yesterday's if none is named. Prints nothing unless somebody should look.
cd "$(dirname "$0")" || exit 1
day=${1:-$(date -d yesterday +%F)}

score() {
    anomalib-gen score "incoming/$day" --output "scores/$day.parquet" --config score.toml --quiet
}

score
code=$?
if [ "$code" -ge 5 ]; then
    echo "nightly: ended with code $code; going on from there"
    score
    code=$?
fi
case $code in
    0) ;;
    3) echo "nightly: ALERT for $day, see scores/$day.parquet" ;;
    4) echo "nightly: $day is scored but for scores/$day.parquet.quarantine.jsonl" ;;
    *) echo "nightly: FAILED for $day with code $code" ;;
esac
exit "$code"
