#!/bin/sh
# Score the files of a day, yesterday's if none is named. Prints nothing unless somebody should look.
cd "$(dirname "$0")" || exit 1
day=${1:-$(date -d yesterday +%F)}
scores=scores/$day.parquet

run() {
    anomalib-gen "$@" --config score.toml --quiet
}

run score "incoming/$day" --output "$scores"
code=$?
if [ "$code" -ge 5 ]; then
    echo "nightly: ended with code $code; going on from there"
    run score "incoming/$day" --output "$scores"
    code=$?
fi
case $code in
    0 | 3 | 4)
        run monitor "$scores" --input "incoming/$day" --run "$day"
        drift=$?
        if [ "$code" -ne 3 ] && [ "$drift" -ne 0 ]; then code=$drift; fi
        run report "$scores" --output "$scores.html" || echo "nightly: no whole report (code $?)"
        ;;
esac
case $code in
    0) ;;
    3) echo "nightly: ALERT for $day, see $scores.html" ;;
    4) echo "nightly: done for $day, but not all of it, see $scores.html" ;;
    *) echo "nightly: FAILED for $day with code $code" ;;
esac
exit "$code"
