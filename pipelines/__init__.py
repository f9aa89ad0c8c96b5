"""The product: the stages of the pipeline, the registry steps and the monitor's steps. Imports no Airflow."""
