"""Everything that imports ray or mlflow."""
