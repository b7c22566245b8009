//! Metrics in CloudWatch's embedded metric format: a JSON line on standard
//! output that CloudWatch Logs turns into metrics, with no API call and no
//! agent. Format: the "Specification: Embedded metric format" page of the
//! CloudWatch user guide.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// The namespace used when `METRICS_NAMESPACE` is not set.
pub const DEFAULT_NAMESPACE: &str = "ClipImageProcessor";

/// Values of one metric in one line (embedded metric format's limit).
pub const MAX_VALUES_PER_METRIC: usize = 100;

/// Metrics of one line (embedded metric format's limit).
const MAX_METRICS: usize = 100;

/// CloudWatch's units, as far as this project uses them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // CloudWatch's own names.
pub enum Unit {
    Count,
    CountPerSecond,
    Milliseconds,
    Seconds,
    Bytes,
    Percent,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Count => "Count",
            Unit::CountPerSecond => "Count/Second",
            Unit::Milliseconds => "Milliseconds",
            Unit::Seconds => "Seconds",
            Unit::Bytes => "Bytes",
            Unit::Percent => "Percent",
        }
    }
}

/// One line of metrics that share their dimensions.
pub struct MetricLine {
    namespace: String,
    dimensions: Vec<(String, String)>,
    metrics: Vec<(String, Unit, Vec<f64>)>,
    properties: Map<String, Value>,
}

impl MetricLine {
    /// An empty line in `namespace`.
    pub fn new(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            dimensions: Vec::new(),
            metrics: Vec::new(),
            properties: Map::new(),
        }
    }

    /// Adds a dimension, which every metric of the line carries.
    pub fn dimension(mut self, name: &str, value: &str) -> Self {
        self.dimensions.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds a property: searchable in the log, no metric of its own.
    pub fn property(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.properties.insert(name.to_owned(), value.into());
        self
    }

    /// Adds a metric with one value.
    pub fn metric(self, name: &str, unit: Unit, value: f64) -> Self {
        self.values(name, unit, vec![value])
    }

    /// Adds a metric with several values; those over the format's limit of
    /// 100, and metrics without a value, are left out.
    pub fn values(mut self, name: &str, unit: Unit, mut values: Vec<f64>) -> Self {
        values.retain(|value| value.is_finite());
        values.truncate(MAX_VALUES_PER_METRIC);
        if !values.is_empty() && self.metrics.len() < MAX_METRICS {
            self.metrics.push((name.to_owned(), unit, values));
        }
        self
    }

    /// The line as JSON.
    pub fn to_json(&self, now: SystemTime) -> Value {
        let timestamp = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64);
        let names: Vec<&str> = self
            .dimensions
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        let definitions: Vec<Value> = self
            .metrics
            .iter()
            .map(|(name, unit, _)| json!({"Name": name, "Unit": unit.name()}))
            .collect();
        let mut line = self.properties.clone();
        line.insert(
            "_aws".to_owned(),
            json!({
                "Timestamp": timestamp,
                "CloudWatchMetrics": [{
                    "Namespace": self.namespace,
                    "Dimensions": [names],
                    "Metrics": definitions,
                }],
            }),
        );
        for (name, value) in &self.dimensions {
            line.insert(name.clone(), json!(value));
        }
        for (name, _, values) in &self.metrics {
            let value = match values.as_slice() {
                [one] => json!(one),
                many => json!(many),
            };
            line.insert(name.clone(), value);
        }
        Value::Object(line)
    }

    /// Writes the line to standard output. A closed output is ignored: a
    /// program must not fail because nobody reads its metrics.
    pub fn emit(&self) {
        let mut line = self.to_json(SystemTime::now()).to_string();
        line.push('\n');
        let mut stdout = std::io::stdout().lock();
        let _ = stdout.write_all(line.as_bytes());
        let _ = stdout.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_line_has_the_embedded_metric_form() {
        let line = MetricLine::new("ClipImageProcessor")
            .dimension("QueueName", "input")
            .property("cause", "idle")
            .metric("ImagesPerSecond", Unit::CountPerSecond, 41.5)
            .values("BatchSize", Unit::Count, vec![8.0, 3.0])
            .to_json(UNIX_EPOCH + Duration::from_millis(1_700_000_000_123));
        assert_eq!(
            line,
            json!({
                "_aws": {
                    "Timestamp": 1_700_000_000_123_u64,
                    "CloudWatchMetrics": [{
                        "Namespace": "ClipImageProcessor",
                        "Dimensions": [["QueueName"]],
                        "Metrics": [
                            {"Name": "ImagesPerSecond", "Unit": "Count/Second"},
                            {"Name": "BatchSize", "Unit": "Count"},
                        ],
                    }],
                },
                "QueueName": "input",
                "cause": "idle",
                "ImagesPerSecond": 41.5,
                "BatchSize": [8.0, 3.0],
            })
        );
    }

    #[test]
    fn values_over_the_formats_limit_and_no_values_are_left_out() {
        let line = MetricLine::new("n")
            .values("Many", Unit::Count, vec![1.0; 150])
            .values("None", Unit::Count, vec![f64::NAN])
            .to_json(UNIX_EPOCH);
        assert_eq!(line["Many"].as_array().map(Vec::len), Some(100));
        assert_eq!(line.get("None"), None);
    }
}
