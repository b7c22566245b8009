#!/usr/bin/env bash
# Makes outcomes.txt: what commit 596becd did with each input, and behind `>` what is done now where that differs.
set -euo pipefail
cd "$(dirname "$0")/../.."
before=$(mktemp -d)
trap 'git worktree remove --force "$before"' EXIT
git worktree add --quiet --detach "$before" 596becd
cp -r events/samples "$before/events/"
cp events/tests/outcomes.rs "$before/events/tests/"
table=$PWD/events/tests/outcomes.txt
(cd "$before" && OUTCOMES_BEFORE=$table cargo test --quiet -p events --test outcomes)
OUTCOMES_AFTER=1 cargo test --quiet -p events --test outcomes
