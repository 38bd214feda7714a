"""What a job asks before it starts ranks: `python -m sambalm.slurm.prepare RANKS CONFIG [section.key=value]...`.

Prints run.fruitless_attempts and the run's folder; a config that cannot run on so many ranks ends in one sentence and
exit code 2.
"""

import sys
from pathlib import Path


def main() -> None:
    ranks, config_path, *overrides = sys.argv[1:]
    from sambalm.pretrain.config_file import load_config

    try:
        config = load_config(Path(config_path), overrides)
        config.check_world(int(ranks))
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code)
    print(config.run.fruitless_attempts, config.run.dir)


if __name__ == "__main__":
    main()
