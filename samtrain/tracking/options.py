"""The `tracking:` section."""

from samtrain.core.options import Options


class TrackingOptions(Options):
    """MLflow. `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` and `MLFLOW_RUN_ID` win over what stands here.

    tracking_uri: null = an embedded SQLite store, `sqlite:///<absolute path of runs/mlflow.db>`.
    """

    tracking_uri: str | None = None
    experiment_name: str = "samtrain"
    system_metrics: bool = True
    log_model: bool = True  # the exported folder as an artifact
