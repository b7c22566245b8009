//! The scaler's configuration, read once from the environment.

use platform::env::{EnvError, Reader, invalid};

use planner::{CapacityOption, Policy};

/// Largest MAX_INSTANCES accepted. DescribeAutoScalingGroups, tags and the log
/// line stay small below it; GPU quotas end long before.
const LARGEST_FLEET: u32 = 500;

#[derive(Clone, Debug)]
pub struct Config {
    /// `INPUT_QUEUE_URL`: the queue whose backlog counts. Required.
    pub input_queue_url: String,
    /// `ECS_CLUSTER`: name or ARN of the cluster. Required.
    pub cluster: String,
    /// `TASK_DEFINITION`: family, family:revision or ARN of the task. Required.
    pub task_definition: String,
    /// `METRICS_NAMESPACE`: where metrics go and `ImagesPerSecond` is read.
    pub metrics_namespace: String,
    /// `MAX_INSTANCES`, `MIN_INSTANCES`, `TARGET_DRAIN_SECONDS`,
    /// `IDLE_GRACE_SECONDS`, `IDLE_EXIT_SECONDS`, `BOOT_SECONDS`,
    /// `IMAGES_PER_SECOND`, `CAPACITY_OPTIONS`.
    pub policy: Policy,
}

const OPTIONS_FORM: &str = r#"a JSON list in order of preference, such as [{"name":"g4dn.xlarge/on-demand","autoScalingGroup":"clip-1","instanceType":"g4dn.xlarge"}]"#;

impl Config {
    pub fn read(env: &Reader<'_>) -> Result<Self, EnvError> {
        Ok(Self {
            input_queue_url: env.required("INPUT_QUEUE_URL", "the URL of the input queue")?,
            cluster: env.required("ECS_CLUSTER", "the name or ARN of the ECS cluster")?,
            task_definition: env.required(
                "TASK_DEFINITION",
                "the family or ARN of the task definition",
            )?,
            metrics_namespace: env
                .optional("METRICS_NAMESPACE")
                .unwrap_or_else(|| platform::metrics::DEFAULT_NAMESPACE.to_owned()),
            policy: read_policy(env)?,
        })
    }

    /// Last segment of the queue's URL: its name.
    pub fn queue_name(&self) -> &str {
        self.input_queue_url
            .trim_end_matches('/')
            .rsplit('/')
            .next()
            .unwrap_or(&self.input_queue_url)
    }
}

/// Reads the policy alone, which is all that `scaler explain` needs.
pub fn read_policy(env: &Reader<'_>) -> Result<Policy, EnvError> {
    let default = Policy::default();
    let max_instances = env.within(
        "MAX_INSTANCES",
        default.max_instances,
        1..=LARGEST_FLEET,
        "instances",
    )?;
    let min_instances = env.within(
        "MIN_INSTANCES",
        default.min_instances,
        0..=LARGEST_FLEET,
        "instances",
    )?;
    // The template deploys both numbers as they come, and a scaler that
    // refuses to start would leave the queue alone for ever.
    if min_instances > max_instances {
        tracing::warn!(
            min_instances,
            max_instances,
            "MIN_INSTANCES is above MAX_INSTANCES, which counts; set MIN_INSTANCES lower"
        );
    }
    let images_per_second = env.within(
        "IMAGES_PER_SECOND",
        default.images_per_second,
        0.01..=100_000.0,
        "images per second",
    )?;
    let options_text = env.required("CAPACITY_OPTIONS", OPTIONS_FORM)?;
    let options: Vec<CapacityOption> = serde_json::from_str(&options_text).map_err(|error| {
        invalid(
            "CAPACITY_OPTIONS",
            &options_text,
            &format!("{OPTIONS_FORM} ({error})"),
        )
    })?;
    if options.is_empty() {
        return Err(invalid("CAPACITY_OPTIONS", &options_text, OPTIONS_FORM));
    }
    for (index, option) in options.iter().enumerate() {
        let repeated = options[..index]
            .iter()
            .any(|earlier| earlier.auto_scaling_group == option.auto_scaling_group);
        if repeated || option.auto_scaling_group.is_empty() {
            return Err(invalid(
                "CAPACITY_OPTIONS",
                &options_text,
                "one Auto Scaling group per option, each named once",
            ));
        }
    }
    Ok(Policy {
        max_instances,
        min_instances: min_instances.min(max_instances),
        target_drain_seconds: env.within(
            "TARGET_DRAIN_SECONDS",
            default.target_drain_seconds,
            1..=86_400,
            "seconds",
        )?,
        idle_grace_seconds: env.within(
            "IDLE_GRACE_SECONDS",
            default.idle_grace_seconds,
            0..=86_400,
            "seconds",
        )?,
        idle_exit_seconds: env.within(
            "IDLE_EXIT_SECONDS",
            default.idle_exit_seconds,
            0..=86_400,
            "seconds",
        )?,
        boot_seconds: env.within("BOOT_SECONDS", default.boot_seconds, 1..=3_600, "seconds")?,
        images_per_second,
        options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Config, EnvError> {
        let mut all = vec![
            (
                "INPUT_QUEUE_URL",
                "https://sqs.eu-west-1.amazonaws.com/1/clip-input",
            ),
            ("ECS_CLUSTER", "clip"),
            (
                "TASK_DEFINITION",
                "arn:aws:ecs:eu-west-1:1:task-definition/gpu-task:7",
            ),
            (
                "CAPACITY_OPTIONS",
                r#"[{"name":"a","autoScalingGroup":"g"}]"#,
            ),
        ];
        all.splice(0..0, pairs.iter().copied());
        Config::read(&Reader::new(move |name| {
            all.iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| (*value).to_owned())
        }))
    }

    #[test]
    fn the_queues_name_comes_from_its_url() {
        let config = read(&[]).expect("a complete environment");
        assert_eq!(config.queue_name(), "clip-input");
    }

    #[test]
    fn defaults_are_the_policys() {
        let mut expected = Policy::default();
        let policy = read(&[]).expect("a complete environment").policy;
        expected.options = policy.options.clone();
        assert_eq!(policy, expected);
    }

    #[test]
    fn a_minimum_above_the_maximum_is_the_maximum() {
        let policy = read(&[("MIN_INSTANCES", "6"), ("MAX_INSTANCES", "2")])
            .expect("an environment to go on with")
            .policy;
        assert_eq!((policy.min_instances, policy.max_instances), (2, 2));
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        for (name, value, says) in [
            ("MAX_INSTANCES", "0", "MAX_INSTANCES"),
            ("MIN_INSTANCES", "-1", "MIN_INSTANCES"),
            ("BOOT_SECONDS", "soon", "1 to 3600 seconds"),
            ("CAPACITY_OPTIONS", "[]", "JSON list"),
            ("CAPACITY_OPTIONS", r#"[{"name":"a"}]"#, "autoScalingGroup"),
            (
                "CAPACITY_OPTIONS",
                r#"[{"name":"a","autoScalingGroup":"g"},{"name":"b","autoScalingGroup":"g"}]"#,
                "named once",
            ),
            ("IMAGES_PER_SECOND", "-1", "images per second"),
        ] {
            let error = read(&[(name, value)]).expect_err(name).to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
