"""What a job asks before it starts ranks: `python -m sambalm.slurm.prepare RANKS CONFIG [section.key=value]...`.

Prints the exit codes for a requeue and for a lack of progress, the limit of attempts without progress, and the run's
folder. A config that cannot run on so many ranks ends in one sentence and exit code 2.
"""

import sys
from pathlib import Path

from sambalm.pretrain.errors import ExitCode, ending_in_a_sentence


def main() -> None:
    ranks, config_path, *overrides = sys.argv[1:]
    with ending_in_a_sentence():
        from sambalm.pretrain.config_file import load_config

        config = load_config(Path(config_path), overrides)
        config.check_world(int(ranks))
    print(int(ExitCode.REQUEUE), int(ExitCode.NO_PROGRESS), config.run.max_attempts_without_progress, config.run.dir)


if __name__ == "__main__":
    main()
