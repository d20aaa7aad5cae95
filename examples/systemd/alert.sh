#!/bin/sh
# Put your pager, chat or mail in place of `logger`.
case ${MONITOR_EXIT_STATUS:-unknown} in
    3) what="ALERT: more anomalies than expected, or drift" ;;
    1) what="FAILED: wrong options, or another run holds the output" ;;
    2) what="FAILED: files are missing or do not fit the model" ;;
    *) what="FAILED with ${MONITOR_EXIT_CODE:-unknown} ${MONITOR_EXIT_STATUS:-unknown}" ;;
esac
logger --stderr --priority user.crit --tag anomalib-gen "$what; see: journalctl -u ${MONITOR_UNIT:-anomalib-score.service}"
