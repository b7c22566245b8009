//! What every program of the pipeline does at start: AWS clients, logs, metrics and configuration.
