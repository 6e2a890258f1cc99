"""`python -m samtrain.tracking.replay SPOOL`: send to MLflow what it missed while it was down."""

import argparse
import sys

from samtrain.core.errors import EXIT_SUCCESS, SamtrainError


def main(arguments: list[str] | None = None) -> int:
    from samtrain.tracking.mlflow_tracker import replay

    parser = argparse.ArgumentParser(prog="python -m samtrain.tracking.replay", description=__doc__)
    parser.add_argument("spool", help="the folder that the run's warning named, e.g. runs/mini/tracking")
    parser.add_argument("--tracking-uri", help="default: MLFLOW_TRACKING_URI, else the server the run was using")
    values = parser.parse_args(arguments)
    try:
        run_id = replay(values.spool, values.tracking_uri)
    except SamtrainError as error:
        print(f"samtrain: {error}", file=sys.stderr)
        return error.exit_code
    print(f"sent; run {run_id}")
    return EXIT_SUCCESS


if __name__ == "__main__":
    sys.exit(main())
