//! The project passes its own assertions, and each mistake that they are there
//! for makes them fail.

use std::path::Path;
use std::sync::LazyLock;

use infra_checks::{Finding, Project};
use template::Template;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// A copy to change; reading all sources takes a while.
fn project() -> Project {
    static PROJECT: LazyLock<Project> =
        LazyLock::new(|| Project::read(root()).expect("the project can be read"));
    PROJECT.clone()
}

fn list(findings: &[Finding]) -> String {
    findings
        .iter()
        .map(|finding| format!("\n  {finding}"))
        .collect()
}

#[test]
fn the_project_has_no_findings() {
    let findings = project().findings();
    assert!(findings.is_empty(), "{}", list(&findings));
}

/// Changes the template's text, everywhere, and expects a finding that says so.
#[track_caller]
fn template_mistake(from: &str, to: &str, says: &str) {
    let mut project = project();
    let changed = project.template.text.replace(from, to);
    assert_ne!(
        changed, project.template.text,
        "the template no longer says {from:?}"
    );
    project.template = Template::parse(&changed).expect("the seeded template can be read");
    expect(&project, says);
}

#[track_caller]
fn expect(project: &Project, says: &str) {
    let findings = project.findings();
    let is_found = findings
        .iter()
        .any(|finding| finding.to_string().contains(says));
    assert!(is_found, "nothing says {says:?}; found:{}", list(&findings));
}

#[test]
fn a_visibility_timeout_that_differs_from_what_the_task_is_told() {
    template_mistake(
        "VisibilityTimeout: !Ref VisibilityTimeoutSeconds",
        "VisibilityTimeout: 200",
        "they must be equal",
    );
}

#[test]
fn a_visibility_timeout_shorter_than_the_work() {
    template_mistake(
        "    Default: 180\n    MinValue: 130\n",
        "    Default: 100\n",
        "the stopping task may work on it",
    );
}

#[test]
fn a_queue_without_dead_letters() {
    template_mistake(
        "        deadLetterTargetArn: !GetAtt DeadLetterQueue.Arn\n",
        "",
        "has no dead-letter queue",
    );
}

#[test]
fn protected_instances_that_nothing_releases() {
    template_mistake(
        "        - !Ref AutoScalingGroup1\n        - !If [HasOption2",
        "        - !If [HasOption2",
        "keep the stack from being deleted",
    );
    template_mistake(
        "set_instance_protection(",
        "set_instance_health(",
        "keep the stack from being deleted",
    );
    template_mistake(
        "                  - autoscaling:SetInstanceProtection\n",
        "",
        "keep the stack from being deleted",
    );
}

#[test]
fn unprotected_instances() {
    template_mistake(
        "NewInstancesProtectedFromScaleIn: true",
        "NewInstancesProtectedFromScaleIn: false",
        "a lower DesiredCapacity could end a working one",
    );
}

#[test]
fn managed_termination_protection_without_its_pair() {
    template_mistake(
        "  TaskLogGroup:\n",
        "  Provider:\n    Type: AWS::ECS::CapacityProvider\n    Properties:\n      AutoScalingGroupProvider:\n        \
         AutoScalingGroupArn: !Ref AutoScalingGroup1\n        ManagedTerminationProtection: ENABLED\n  TaskLogGroup:\n",
        "managed termination protection needs managed scaling",
    );
}

#[test]
fn a_group_that_is_not_from_zero_or_is_reset_by_updates() {
    template_mistake(
        "      MinSize: \"0\"\n",
        "      MinSize: \"1\"\n",
        "MinSize must be 0",
    );
    template_mistake(
        "      MinSize: \"0\"\n",
        "      MinSize: \"0\"\n      DesiredCapacity: \"0\"\n",
        "every stack update would reset",
    );
    template_mistake(
        "      MaxSize: !Ref MaxInstances\n",
        "      MaxSize: \"7\"\n",
        "MaxSize must be MAX_INSTANCES",
    );
}

#[test]
fn imds_version_1() {
    template_mistake(
        "HttpTokens: required",
        "HttpTokens: optional",
        "IMDSv2 is not required",
    );
    template_mistake(
        "HttpPutResponseHopLimit: 1",
        "HttpPutResponseHopLimit: 2",
        "containers reach the instance's metadata",
    );
}

#[test]
fn instances_that_survive_or_take_connections() {
    template_mistake(
        "        EbsOptimized: true\n",
        "        DisableApiTermination: true\n",
        "survive the deletion",
    );
    template_mistake(
        "          SourceSecurityGroupId: !Ref InstanceSecurityGroup\n",
        "          CidrIp: 10.0.0.0/8\n",
        "takes connections from an address range",
    );
    template_mistake(
        "            ECS_ENABLE_GPU_SUPPORT=true\n",
        "",
        "does not set ECS_ENABLE_GPU_SUPPORT=true",
    );
    template_mistake(
        "            ECS_WARM_POOLS_CHECK=true\n",
        "",
        "does not set ECS_WARM_POOLS_CHECK=true",
    );
}

#[test]
fn a_stop_timeout_outside_of_what_ecs_allows() {
    template_mistake(
        "StopTimeout: 120",
        "StopTimeout: 300",
        "outside of what ECS allows",
    );
    template_mistake("          StopTimeout: 120\n", "", "StopTimeout is not set");
    template_mistake(
        "StopTimeout: 120",
        "StopTimeout: 60",
        "must be StopTimeout 60",
    );
}

#[test]
fn a_family_that_changes_with_every_update() {
    template_mistake(
        "      Family: !Sub \"${AWS::StackName}-gpu-task\"\n",
        "",
        "Family is not set",
    );
}

#[test]
fn a_minimum_above_the_maximum() {
    template_mistake(
        "!Contains [[\"0\", \"1\"], !Ref",
        "!Contains [[\"0\", \"1\", \"2\"], !Ref",
        "any MinInstances for MaxInstances 1",
    );
}

#[test]
fn a_container_without_memory_or_with_too_much() {
    template_mistake(
        "          Memory: !Ref TaskMemoryMiB\n",
        "",
        "Memory is not set",
    );
    template_mistake(
        "    Default: 13312\n",
        "    Default: 16384\n",
        "does not fit on a 16 GiB instance",
    );
}

#[test]
fn a_volume_that_is_not_declared_or_not_mounted() {
    template_mistake(
        "SourceVolume: model-cache",
        "SourceVolume: models",
        "which is not declared",
    );
    template_mistake(
        "SourceVolume: model-cache",
        "SourceVolume: models",
        "declared and not mounted",
    );
    template_mistake(
        "ContainerPath: /cache",
        "ContainerPath: /other",
        "lies on no volume",
    );
    template_mistake(
        "      SubnetId: !Ref PrivateSubnet2\n",
        "      SubnetId: !Ref PrivateSubnet1\n",
        "no mount target",
    );
}

#[test]
fn a_task_that_is_not_isolated() {
    template_mistake(
        "NetworkMode: bridge",
        "NetworkMode: host",
        "host networking",
    );
    template_mistake(
        "ReadonlyRootFilesystem: true",
        "ReadonlyRootFilesystem: false",
        "root filesystem is writable",
    );
    template_mistake("User: \"65532:65532\"", "User: \"0:0\"", "runs as root");
    template_mistake("Privileged: false", "Privileged: true", "is privileged");
    template_mistake(
        "{ Type: GPU, Value: \"1\" }",
        "{ Type: GPU, Value: \"2\" }",
        "exactly one GPU",
    );
    template_mistake("LogDriver: awslogs", "LogDriver: none", "go nowhere");
}

#[test]
fn a_filter_that_is_not_the_wire_contracts() {
    template_mistake(
        "image/webp, image/x-pcx]",
        "image/webp]",
        "differs from events/filters/subscription.json",
    );
    template_mistake(
        "FilterPolicyScope: MessageBody",
        "FilterPolicyScope: MessageAttributes",
        "must be MessageBody",
    );
    template_mistake(
        "RawMessageDelivery: true",
        "RawMessageDelivery: false",
        "RawMessageDelivery must be true",
    );
    let mut project = project();
    project.vector_store_filter["type"] = serde_json::json!(["document-deleted"]);
    expect(&project, "differs from events/filters/vector-store.json");
    project.subscription_filter["data"]["document"]["type"] = serde_json::json!(["image/png"]);
    expect(
        &project,
        "must name document-created and every supported image type",
    );
}

#[test]
fn a_variable_that_is_not_set_or_not_read() {
    template_mistake(
        "          TARGET_DRAIN_SECONDS: !Ref TargetDrainSeconds\n",
        "",
        "scaler reads TARGET_DRAIN_SECONDS",
    );
    template_mistake(
        "            - { Name: CACHE_PREFIX, Value: clip-image-processor }\n",
        "",
        "gpu-task reads CACHE_PREFIX",
    );
    template_mistake(
        "MODEL_NAME: !Ref ModelName",
        "MODEL: !Ref ModelName",
        "intake reads MODEL_NAME",
    );
    template_mistake(
        "MODEL_NAME: !Ref ModelName",
        "MODEL: !Ref ModelName",
        "MODEL is set, but intake does not read it",
    );
    let mut project = project();
    let scaler = project
        .programs
        .0
        .get_mut("scaler")
        .expect("the scaler is a program");
    scaler.variables.insert("NEW_VARIABLE".to_owned());
    expect(&project, "scaler reads NEW_VARIABLE, which is not set");
}

#[test]
fn a_call_without_permission_and_a_permission_without_call() {
    template_mistake(
        "                Action: ecs:RunTask\n",
        "                Action: ecs:StopTask\n",
        "may not ecs:RunTask",
    );
    template_mistake(
        "                  - autoscaling:CreateOrUpdateTags\n",
        "",
        "may not autoscaling:CreateOrUpdateTags",
    );
    template_mistake(
        "Action: iam:PassRole",
        "Action: ecs:StopTask",
        "may not iam:PassRole",
    );
    template_mistake(
        "[s3:PutObject, s3:GetObject, s3:DeleteObject]",
        "[s3:GetObject, s3:DeleteObject]",
        "may not s3:PutObject",
    );
    template_mistake(
        "                Action: sqs:GetQueueAttributes\n",
        "                Action: [sqs:GetQueueAttributes, sqs:PurgeQueue]\n",
        "sqs:PurgeQueue is allowed, but scaler never does it",
    );
    let mut project = project();
    let task = project
        .programs
        .0
        .get_mut("gpu-task")
        .expect("the task is a program");
    task.operations.insert("delete_bucket".to_owned());
    task.unknown_calls.push("something.send()".to_owned());
    expect(
        &project,
        "calls delete_bucket, whose IAM actions are not in the table",
    );
    expect(&project, "which API call is this? something.send()");
}

#[test]
fn wildcards_in_policies() {
    template_mistake(
        "Action: sns:Publish, Resource: !Ref OutputTopic",
        "Action: sns:*, Resource: !Ref OutputTopic",
        "sns:* is a wildcard",
    );
    template_mistake(
        "                Action: iam:PassRole\n                Resource: [!GetAtt TaskRole.Arn, !GetAtt TaskExecutionRole.Arn]\n",
        "                Action: iam:PassRole\n                # Reason.\n                Resource: \"*\"\n",
        "iam:PassRole has a resource level",
    );
    template_mistake(
        "                  - !Sub \"arn:${AWS::Partition}:s3:::${SourceBucket1}/${SourcePrefix}*\"\n",
        "                  - !Sub \"arn:${AWS::Partition}:s3:::*\"\n",
        "s3:GetObject has a resource level",
    );
    template_mistake(
        "                # Knows no resource level.\n",
        "",
        "a comment must say why",
    );
    template_mistake(
        "                Action: iam:PassRole\n",
        "                NotAction: iam:PassRole\n",
        "NotAction",
    );
}

#[test]
fn an_arn_or_host_of_one_partition() {
    template_mistake(
        "arn:${AWS::Partition}:ecr:",
        "arn:aws:ecr:",
        "an ARN of one partition",
    );
    template_mistake(
        ".${AWS::URLSuffix}/${ImageRepository}",
        ".amazonaws.com/${ImageRepository}",
        "a host name of one partition",
    );
    template_mistake(
        "https://${Console}/",
        "https://console.aws.amazon.com/",
        "a host name of one partition",
    );
}

#[test]
fn lifetimes_that_differ() {
    template_mistake(
        "!If [HasVectorRetention, !Ref VectorRetentionDays, !Ref RetentionDays]",
        "1",
        "vectors live for Some(1.0) days",
    );
    template_mistake(
        "              - !Ref AWS::NoValue\n              - !If [HasVectorRetention",
        "              - 30\n              - !If [HasVectorRetention",
        "expire after Some(30.0) days, which is not what was chosen",
    );
    template_mistake(
        "MessageRetentionPeriod: !FindInMap [Retention, !Ref RetentionDays, Seconds]",
        "MessageRetentionPeriod: 60",
        "keeps messages for Some(60.0) s",
    );
    template_mistake(
        "\"7\": { Seconds: 604800 }",
        "\"7\": { Seconds: 60480 }",
        "7 days are not",
    );
}

#[test]
fn plain_connections_and_plain_disks() {
    template_mistake(
        "Condition: { Bool: { aws:SecureTransport: \"false\" } }",
        "Condition: { Bool: { aws:SecureTransport: \"true\" } }",
        "no policy denies",
    );
    template_mistake(
        "TransitEncryption: ENABLED",
        "TransitEncryption: DISABLED",
        "mounted without TLS",
    );
    template_mistake(
        "              Encrypted: true\n",
        "              Encrypted: false\n",
        "LaunchTemplate: is not encrypted",
    );
    template_mistake(
        "      Encrypted: true\n",
        "      Encrypted: false\n",
        "ModelFileSystem: is not encrypted",
    );
}

#[test]
fn alarms_and_metrics_that_do_not_exist() {
    template_mistake(
        "MetricName: CrashLoop",
        "MetricName: CrashLoops",
        "no program emits CrashLoops",
    );
    template_mistake(
        "MetricName: CrashLoop",
        "MetricName: CrashLoops",
        "none tells that tasks crash in a loop",
    );
    template_mistake(
        "              MetricName: Instances\n",
        "              MetricName: Standing\n",
        "none tells that instances stand and nothing is done",
    );
    template_mistake(
        "              MetricName: Instances\n",
        "              MetricName: Standing\n",
        "IdleInstancesAlarm: no program emits Standing",
    );
    template_mistake(
        "      InsufficientDataActions:\n",
        "      Other:\n",
        "ScalerSilentAlarm: reaches nobody",
    );
    template_mistake(
        "      KmsMasterKeyId: !If [HasKey, !Ref KmsKeyArn, !Ref AWS::NoValue]\n      Subscription",
        "      KmsMasterKeyId: alias/aws/sns\n      Subscription",
        "AlarmTopic: is not encrypted",
    );
    template_mistake(
        "\"ClipImageProcessor\", \"Images\"",
        "\"ClipImageProcessor\", \"Pictures\"",
        "no program emits Pictures",
    );
    template_mistake(
        "            \"periodOverride\": \"inherit\",\n",
        "            \"periodOverride\": inherit,\n",
        "its body is no JSON",
    );
}

#[test]
fn functions_that_lose_events_or_cannot_be_called() {
    template_mistake(
        "      DestinationConfig:\n        OnFailure:",
        "      Other:\n        OnFailure:",
        "no OnFailure destination",
    );
    template_mistake(
        "          DeadLetterConfig: { Arn: !GetAtt IntakeFailureQueue.Arn }\n",
        "",
        "no DeadLetterConfig",
    );
    template_mistake(
        "SourceArn: !GetAtt ScalerScheduleRule.Arn",
        "SourceArn: !GetAtt SourceEventsRule.Arn",
        "may not invoke ScalerFunction",
    );
    template_mistake(
        "!If [ReservesConcurrency, 1,",
        "!If [ReservesConcurrency, 2,",
        "must be Some(1.0)",
    );
    template_mistake(
        "!If [ReservesConcurrency, 1, !Ref AWS::NoValue]",
        "1",
        "a new account can reserve none",
    );
    template_mistake(
        "      Timeout: 60\n",
        "      Timeout: 1000\n",
        "must be 1 to 900 s",
    );
}

#[test]
fn logs_for_ever() {
    template_mistake(
        "      RetentionInDays: !Ref LogRetentionDays\n",
        "",
        "keeps its logs for ever",
    );
    template_mistake(
        "      LoggingConfig: { LogGroup: !Ref ScalerLogGroup }\n",
        "",
        "a log group that is not in the template",
    );
}

/// Changes the Dockerfile and expects a finding.
#[track_caller]
fn dockerfile_mistake(from: &str, to: &str, says: &str) {
    let mut project = project();
    let changed = project.dockerfile.replace(from, to);
    assert_ne!(
        changed, project.dockerfile,
        "the Dockerfile no longer says {from:?}"
    );
    project.dockerfile = changed;
    expect(&project, says);
}

#[test]
fn an_image_that_is_not_hardened() {
    dockerfile_mistake("USER 65532:65532", "USER root", "a user that is not root");
    dockerfile_mistake(
        "USER 65532:65532",
        "USER 1000:1000",
        "is not the task definition's",
    );
    dockerfile_mistake(" --require-hashes", "", "pip without --require-hashes");
    dockerfile_mistake(
        "RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot",
        "RUNTIME_IMAGE=debian:latest",
        "needs a version or digest",
    );
    dockerfile_mistake(
        "ENTRYPOINT [\"/usr/local/bin/gpu-task\"]",
        "ENTRYPOINT /usr/local/bin/gpu-task",
        "must be a program",
    );
    dockerfile_mistake(
        "    ORT_DISABLE_TELEMETRY=1 \\\n",
        "",
        "ORT_DISABLE_TELEMETRY must be 1",
    );
    dockerfile_mistake(" AS cuda", " AS gpu", "has no target cuda");
    dockerfile_mistake(
        "ENV ORT_DYLIB_PATH",
        "ENV OTHER_PATH",
        "gpu-task reads ORT_DYLIB_PATH",
    );
}

#[test]
fn a_health_check_that_cannot_run() {
    template_mistake(
        "gpu-task, --check-config]",
        "gpu-task, --healthy]",
        "gpu-task knows no --healthy",
    );
    template_mistake(
        "[CMD, /usr/local/bin/gpu-task",
        "[CMD-SHELL, curl",
        "the image has no shell",
    );
}

#[test]
fn a_parameter_that_nobody_explains() {
    template_mistake(
        "Parameters: [VpcId, PrivateSubnet1,",
        "Parameters: [PrivateSubnet1,",
        "VpcId: is in no group",
    );
    template_mistake(
        "The VPC in which",
        "The network in which",
        "infra/README.md does not list it",
    );
    template_mistake(
        "    Description: The CLIP model.",
        "    Comment: The CLIP model.",
        "ModelName: has no description",
    );
}

#[test]
fn a_synthesised_template_that_lacks_what_the_template_has() {
    let mut project = project();
    let queue = r#"{"Resources": {"InputQueue": {"Type": "AWS::SQS::Queue"}}}"#;
    let synthesised = Template::parse(queue).expect("it can be read");
    project.synthesised.push(synthesised);
    expect(&project, "InputQueue: has no dead-letter queue");
}

#[test]
fn an_express_lane_that_would_lose_something() {
    for (from, to, says) in [
        (
            "!If [HasExpress, !GetAtt GpuQueue.Arn, !GetAtt DeadLetterQueue.Arn]",
            "!GetAtt DeadLetterQueue.Arn",
            "must get to the GPU queue",
        ),
        (
            "maxReceiveCount: 7",
            "maxReceiveCount: 5",
            "must leave tasks four deliveries",
        ),
        (
            "{ Name: GPU_QUEUE_URL, Value: !Ref GpuQueue }",
            "{ Name: GPU_QUEUE_URL, Value: !Ref InputQueue }",
            "nobody else reads",
        ),
        (
            "          GPU_QUEUE_URL: !Ref GpuQueue\n",
            "          GPU_QUEUE_URL: !Ref DeadLetterQueue\n",
            "the queue that tasks read",
        ),
        (
            "          VISIBILITY_TIMEOUT_SECONDS: 60\n",
            "          VISIBILITY_TIMEOUT_SECONDS: 50\n",
            "is not the input queue's",
        ),
        (
            "      BatchSize: !If [HasExpressBatchSize,",
            "      BatchSize: !If [HasExpress,",
            "BATCH_SIZE is not the mapping's",
        ),
        (
            "      BatchSize: !If [HasExpressBatchSize, !Ref ExpressBatchSize, !If [IsLargeModel, 4, 10]]\n      FunctionResponseTypes: [ReportBatchItemFailures]",
            "      BatchSize: 10",
            "bring its whole batch back",
        ),
        (
            "      Layers: [!Ref OnnxRuntimeLayer]\n",
            "      ReservedConcurrentExecutions: 5\n",
            "reserved concurrency",
        ),
        (
            "VisibilityTimeout: !If [HasExpress, 60,",
            "VisibilityTimeout: !If [HasExpress, 45,",
            "less than 2 times",
        ),
    ] {
        template_mistake(from, to, says);
    }
}

#[test]
fn a_lane_that_is_off_and_leaves_a_trace() {
    template_mistake(
        "!If [HasExpress, 60, !Ref VisibilityTimeoutSeconds]",
        "60",
        "VISIBILITY",
    );
    template_mistake(
        "- !If [HasExpress, { Name: GPU_QUEUE_URL, Value: !Ref GpuQueue }, !Ref AWS::NoValue]",
        "- { Name: GPU_QUEUE_URL, Value: \"\" }",
        "knows of the lane",
    );
}
