//! The scaler's configuration, read once from the environment.

use platform::env::{EnvError, Reader, invalid};

use planner::{CapacityOption, LanePolicy, Policy};

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
    /// The express lane, where there is one.
    pub lane: Option<LaneConfig>,
}

/// Where the express lane is.
#[derive(Clone, Debug, Default)]
pub struct LaneConfig {
    /// `GPU_QUEUE_URL`: what only GPUs can do.
    pub gpu_queue_url: String,
    /// `EXPRESS_MAPPING_UUID`: from the input queue to the function.
    pub mapping: String,
    /// `EXPRESS_FUNCTION_NAME`.
    pub function: String,
}

const OPTIONS_FORM: &str = r#"a JSON list in order of preference, such as [{"name":"g4dn.xlarge/on-demand","autoScalingGroup":"clip-1","instanceType":"g4dn.xlarge"}]"#;

/// With it the stack has an express lane.
const MAPPING: &str = "EXPRESS_MAPPING_UUID";

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
            lane: read_lane(env)?,
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

fn read_lane(env: &Reader<'_>) -> Result<Option<LaneConfig>, EnvError> {
    let Some(mapping) = env.optional(MAPPING) else {
        return Ok(None);
    };
    Ok(Some(LaneConfig {
        gpu_queue_url: env.required("GPU_QUEUE_URL", "the URL of the GPUs' own queue")?,
        mapping,
        function: env.required("EXPRESS_FUNCTION_NAME", "the name of the express function")?,
    }))
}

/// The lane's rules and prices: with a lane, its prices are required.
fn read_lane_policy(env: &Reader<'_>) -> Result<Option<LanePolicy>, EnvError> {
    if env.optional(MAPPING).is_none() {
        return Ok(None);
    }
    env.required("PRICE_EXPRESS_GB_SECOND", "its price in dollars")?;
    env.required("PRICE_EXPRESS_REQUEST", "its price in dollars")?;
    Ok(Some(LanePolicy {
        max_concurrency: env.within("EXPRESS_MAX_CONCURRENCY", 10, 2..=1_000, "invocations")?,
        memory_mb: env.within("EXPRESS_MEMORY_MB", 1_769, 128..=10_240, "MiB")?,
        batch_size: env.within("EXPRESS_BATCH_SIZE", 10, 1..=10, "images")?,
        seconds_per_image: env.within(
            "EXPRESS_SECONDS_PER_IMAGE",
            0.2,
            0.001..=900.0,
            "seconds",
        )?,
        usd_per_gb_second: env.within("PRICE_EXPRESS_GB_SECOND", 0.0, 0.0..=1.0, "dollars")?,
        usd_per_request: env.within("PRICE_EXPRESS_REQUEST", 0.0, 0.0..=1.0, "dollars")?,
    }))
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
    let mut options: Vec<CapacityOption> =
        serde_json::from_str(&options_text).map_err(|error| {
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
    // In the options' order; 0 or none: not known.
    let prices = [
        env.within(
            "PRICE_INSTANCE_HOUR_1",
            0.0,
            0.0..=1_000.0,
            "dollars an hour",
        )?,
        env.within(
            "PRICE_INSTANCE_HOUR_2",
            0.0,
            0.0..=1_000.0,
            "dollars an hour",
        )?,
        env.within(
            "PRICE_INSTANCE_HOUR_3",
            0.0,
            0.0..=1_000.0,
            "dollars an hour",
        )?,
    ];
    for (option, price) in options.iter_mut().zip(prices) {
        option.usd_per_hour = option.usd_per_hour.or((price > 0.0).then_some(price));
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
        lane: read_lane_policy(env)?,
        max_daily_cost: env.within("MAX_DAILY_COST", 0.0, 0.0..=1e6, "dollars, 0 for none")?,
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
    fn a_lane_needs_its_queue_function_and_prices() {
        let lane = [
            ("EXPRESS_MAPPING_UUID", "m"),
            ("GPU_QUEUE_URL", "https://sqs/1/gpu"),
            ("EXPRESS_FUNCTION_NAME", "express"),
            ("PRICE_EXPRESS_GB_SECOND", "0.0000166667"),
            ("PRICE_EXPRESS_REQUEST", "0.0000002"),
            ("PRICE_INSTANCE_HOUR_1", "0.526"),
        ];
        let config = read(&lane).expect("a complete environment");
        assert_eq!(config.lane.map(|lane| lane.mapping).as_deref(), Some("m"));
        assert_eq!(config.policy.options[0].usd_per_hour, Some(0.526));
        assert!(config.policy.lane.is_some());
        for missing in 1..5 {
            let mut some = lane.to_vec();
            let (name, _) = some.remove(missing);
            let error = read(&some).expect_err(name).to_string();
            assert!(error.contains(name), "{error}");
        }
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
