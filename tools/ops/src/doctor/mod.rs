//! Looks into an account for what a deployment needs, before it and after:
//! [`rules`] judge, this asks. Nothing is changed.

mod reader;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use aws_config::SdkConfig;
use clip_model::Manifest;
use clip_model::bundle::MANIFEST;
use platform::aws::{Error, ErrorKind, failed};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use template::{NotDeployed, Parameters, Template, list, text_of};

use crate::cli::DoctorArgs;
use crate::table::{aligned, one_line};
use reader::Reader;
pub use rules::Verdict;
use rules::{DefaultRoute, Judgement, KeyUser, Machine, Notifications, Purchase, Stored, Subnet};

const TEMPLATE: &str = include_str!("../../../../infra/template.yaml");

/// What an instance and its task call, beside S3.
const ENDPOINTS: &[&str] = &[
    "ecs",
    "ecs-agent",
    "ecs-telemetry",
    "ecr.api",
    "ecr.dkr",
    "logs",
    "sqs",
    "elasticfilesystem",
];

const DATA_KEY: &[&str] = &["kms:GenerateDataKey", "kms:Decrypt"];
const LOGS: &[&str] = &[
    "kms:Encrypt",
    "kms:Decrypt",
    "kms:GenerateDataKey",
    "kms:DescribeKey",
];
const VOLUMES: &[&str] = &[
    "kms:Encrypt",
    "kms:Decrypt",
    "kms:GenerateDataKeyWithoutPlaintext",
    "kms:DescribeKey",
    "kms:CreateGrant",
];

/// A line of the report.
#[derive(Debug, Serialize)]
pub struct Finding {
    pub check: String,
    #[serde(flatten)]
    pub judgement: Judgement,
}

/// All lines, in the order in which they were found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub findings: Vec<Finding>,
}

impl Report {
    pub fn has_failed(&self) -> bool {
        self.count(Verdict::Fail) > 0
    }

    pub fn count(&self, verdict: Verdict) -> usize {
        let verdicts = self.findings.iter().map(|one| one.judgement.verdict);
        verdicts.filter(|one| *one == verdict).count()
    }

    pub fn table(&self) -> String {
        let header = ["CHECK", "", "FOUND, AND WHAT TO DO"].map(str::to_owned);
        let mut rows = vec![header];
        for Finding { check, judgement } in &self.findings {
            let verdict = match judgement.verdict {
                Verdict::Pass => "pass",
                Verdict::Fail => "FAIL",
                Verdict::CannotTell => "cannot tell",
            };
            rows.push([check, verdict, &judgement.says].map(one_line));
            if let Some(advice) = &judgement.advice {
                rows.push(["", "", &format!("→ {advice}")].map(one_line));
            }
        }
        aligned(&rows)
    }

    fn add(&mut self, check: impl Into<String>, judgement: Judgement) {
        let check = check.into();
        self.findings.push(Finding { check, judgement });
    }

    /// Judges what could be found out.
    fn judge<T>(
        &mut self,
        check: impl Into<String>,
        fact: Result<T, Error>,
        rule: impl FnOnce(T) -> Judgement,
    ) {
        let judgement = match fact {
            Ok(fact) => rule(fact),
            Err(error) => unknown(&error),
        };
        self.add(check, judgement);
    }
}

fn unknown(error: &Error) -> Judgement {
    let advice = match error.kind {
        ErrorKind::Network | ErrorKind::Throttled => "try again".to_owned(),
        ErrorKind::Access => format!("allow yourself {}", error.operation),
        _ => format!("look yourself: {}", error.operation),
    };
    Judgement::cannot_tell(error.to_string(), advice)
}

/// Asks for everything that the parameters, or the stack's, need.
pub async fn examine(args: &DoctorArgs, sdk: &SdkConfig) -> anyhow::Result<Report> {
    let reader = Reader::new(sdk).await?;
    let mut report = Report::default();
    let stack = match &args.stack {
        Some(name) => Some(describe(&reader, name)?),
        None => None,
    };
    let deployed = stack.as_ref().map(|stack| list(&stack["Parameters"]));
    let parameters = parameters(&deployed.unwrap_or_default(), &args.parameters)?;
    let doctor = Doctor {
        reader: &reader,
        s3: platform::s3_client(sdk),
        lambda: aws_sdk_lambda::Client::new(sdk),
        region: sdk.region().context("no region")?.to_string(),
        parameters,
        is_deployed: stack.is_some(),
    };
    doctor.machines_and_network(&mut report);
    doctor.concurrency(&mut report).await;
    doctor.buckets(&mut report).await;
    doctor.keys(&mut report);
    doctor.image(&mut report);
    doctor.model(args.read_model, &mut report).await;
    if let (Some(stack), Some(name)) = (&stack, &args.stack) {
        doctor.stack(name, stack, &mut report).await;
    }
    Ok(report)
}

fn describe(reader: &Reader, name: &str) -> anyhow::Result<Value> {
    let stacks = reader.read("cloudformation:DescribeStacks", &json!({"StackName": name}))?;
    let stack = stacks["Stacks"][0].clone();
    ensure!(stack.is_object(), "there is no stack {name}");
    Ok(stack)
}

/// The template's parameters: what was given, else what the stack has, else the default.
fn parameters(deployed: &[&Value], given: &[(String, String)]) -> anyhow::Result<Parameters> {
    let template = Template::parse(TEMPLATE)?;
    let mut values = Parameters::new();
    for parameter in deployed {
        let name = text_of(&parameter["ParameterKey"]);
        // A stack of another version may have others.
        if template.part("/Parameters").get(&name).is_some() {
            values.insert(name, text_of(&parameter["ParameterValue"]));
        }
    }
    values.extend(given.iter().cloned());
    Ok(template.resolve(&values, &NotDeployed)?.parameters)
}

struct Doctor<'a> {
    reader: &'a Reader,
    s3: aws_sdk_s3::Client,
    lambda: aws_sdk_lambda::Client,
    region: String,
    parameters: Parameters,
    is_deployed: bool,
}

impl Doctor<'_> {
    fn parameter(&self, name: &str) -> &str {
        self.parameters.get(name).map_or("", String::as_str)
    }

    /// The values of `NAME1` to `NAME3` that are not empty, each with its number.
    fn numbered<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
        let values = (1..=3).map(move |n| (n, self.parameter(&format!("{name}{n}"))));
        values.filter(|(_, value)| !value.is_empty())
    }

    fn machines_and_network(&self, report: &mut Report) {
        let mut bought: BTreeMap<bool, Vec<Machine>> = BTreeMap::new();
        let mut unknown = BTreeSet::new();
        let mut types = BTreeSet::new();
        for (number, name) in self.numbered("InstanceType") {
            let is_spot = self.parameter(&format!("Purchase{number}")) == "spot";
            if !rules::is_g_or_vt(name) {
                unknown.insert(is_spot);
                let advice = "P and other families have quotas of their own";
                let says = "no G or VT instance";
                report.add(
                    format!("quota of {name}"),
                    Judgement::cannot_tell(says, advice),
                );
            }
            let machine = self.machine(name);
            match &machine {
                Ok(Some(machine)) if rules::is_g_or_vt(name) => {
                    bought.entry(is_spot).or_default().push(machine.clone());
                }
                Ok(Some(_)) => {}
                _ => {
                    unknown.insert(is_spot);
                }
            }
            if types.insert(name) {
                report.judge(format!("type {name}"), machine, |machine| match machine {
                    Some(machine) => rules::machine(&machine),
                    None => Judgement::fail("no such type in this region", "take another"),
                });
            }
        }
        let most = self.parameter("MaxInstances").parse().unwrap_or(u32::MAX);
        for (is_spot, purchase, name) in [
            (false, Purchase::OnDemand, "quota On-Demand"),
            (true, Purchase::Spot, "quota Spot"),
        ] {
            let machines = bought.remove(&is_spot).unwrap_or_default();
            let is_unknown = machines.is_empty() && unknown.contains(&is_spot);
            report.judge(name, self.quota(purchase), |quota| match is_unknown {
                true => Judgement::cannot_tell(
                    format!("{quota} vCPUs of G and VT instances, and the types' are not known"),
                    "compare them yourself",
                ),
                false => rules::quota(purchase, quota, &machines, most),
            });
        }
        let found = self.subnets();
        let asked: Vec<&str> = self.numbered("PrivateSubnet").map(|(_, id)| id).collect();
        let vpc = self.parameter("VpcId");
        let subnets = found.as_deref().unwrap_or_default().to_vec();
        report.judge("subnets", found, |found| {
            rules::subnets(vpc, &asked, &found)
        });
        for name in types {
            if !subnets.is_empty() {
                report.judge(format!("zones of {name}"), self.zones(name), |zones| {
                    rules::offered(&zones, &subnets)
                });
            }
        }
        report.judge("DNS of the VPC", self.dns(vpc), |(support, names)| {
            rules::dns(support, names)
        });
        self.ways_out(vpc, &subnets, report);
    }

    fn machine(&self, name: &str) -> Result<Option<Machine>, Error> {
        let input = json!({"InstanceType": [name]});
        let answer = match self.reader.read("ec2:DescribeInstanceTypes", &input) {
            Err(error) if error.code == "InvalidInstanceType" => return Ok(None),
            answer => answer?,
        };
        let found = &answer["instanceTypeSet"][0];
        let has = |list_name: &Value, wanted: &str| {
            list(list_name).iter().any(|one| text_of(one) == wanted)
        };
        let gpus = list(&found["gpuInfo"]["gpus"]);
        Ok(found.is_object().then(|| Machine {
            name: name.to_owned(),
            vcpus: text_of(&found["vCpuInfo"]["defaultVCpus"])
                .parse()
                .unwrap_or(0),
            has_nvidia: gpus.iter().any(|gpu| gpu["manufacturer"] == "NVIDIA"),
            is_x86: has(&found["processorInfo"]["supportedArchitectures"], "x86_64"),
        }))
    }

    fn quota(&self, purchase: Purchase) -> Result<u32, Error> {
        let input = json!({"ServiceCode": "ec2", "QuotaCode": purchase.quota_code()});
        let answer = self.reader.read("servicequotas:GetServiceQuota", &input)?;
        Ok(answer["Quota"]["Value"].as_f64().unwrap_or(0.0) as u32)
    }

    fn subnets(&self) -> Result<Vec<Subnet>, Error> {
        let ids: Vec<&str> = self.numbered("PrivateSubnet").map(|(_, id)| id).collect();
        // By a filter, since one that is not there would fail the call for all.
        let input = json!({"Filter": [{"Name": "subnet-id", "Value": ids}]});
        let answer = self.reader.read("ec2:DescribeSubnets", &input)?;
        let subnet = |found: &Value| Subnet {
            id: text_of(&found["subnetId"]),
            vpc: text_of(&found["vpcId"]),
            zone: text_of(&found["availabilityZone"]),
            gives_public_addresses: found["mapPublicIpOnLaunch"] == "true",
        };
        Ok(items(&answer["subnetSet"]).map(subnet).collect())
    }

    fn zones(&self, name: &str) -> Result<BTreeSet<String>, Error> {
        let filter = json!([{"Name": "instance-type", "Value": [name]}]);
        let input = json!({"LocationType": "availability-zone", "Filter": filter});
        let answer = self
            .reader
            .read("ec2:DescribeInstanceTypeOfferings", &input)?;
        let zones = items(&answer["instanceTypeOfferingSet"]);
        Ok(zones
            .map(|offering| text_of(&offering["location"]))
            .collect())
    }

    fn dns(&self, vpc: &str) -> Result<(bool, bool), Error> {
        let is_on = |attribute: &str| {
            let input = json!({"VpcId": vpc, "Attribute": attribute});
            let answer = self.reader.read("ec2:DescribeVpcAttribute", &input)?;
            Ok(answer[attribute]["value"] == "true")
        };
        Ok((is_on("enableDnsSupport")?, is_on("enableDnsHostnames")?))
    }

    fn ways_out(&self, vpc: &str, subnets: &[Subnet], report: &mut Report) {
        let of_vpc = json!({"Filter": [{"Name": "vpc-id", "Value": [vpc]}]});
        let known = self
            .reader
            .read("ec2:DescribeRouteTables", &of_vpc)
            .and_then(|tables| {
                Ok((
                    tables,
                    self.reader.read("ec2:DescribeVpcEndpoints", &of_vpc)?,
                ))
            });
        let mut needs = ENDPOINTS.to_vec();
        let outputs = self.parameter("OutputKind");
        let also = [
            ("sns", outputs.contains("topic")),
            ("events", outputs.contains("event-bus")),
            ("ssm", self.parameter("InstanceSessions") == "true"),
            ("ssmmessages", self.parameter("InstanceSessions") == "true"),
        ];
        needs.extend(also.iter().filter(|(_, is)| *is).map(|(name, _)| *name));
        for subnet in subnets {
            let known = known.clone();
            let s3 = format!("S3 from {}", subnet.id);
            let out = format!("way out of {}", subnet.id);
            report.judge(out, known.clone(), |(tables, endpoints)| {
                let (_, route) = default_route(&tables, vpc, &subnet.id);
                let has = interfaces(&endpoints, vpc, &self.region);
                rules::way_out(&route, subnet, &has, &needs)
            });
            report.judge(s3, known, |(tables, endpoints)| {
                let (table, route) = default_route(&tables, vpc, &subnet.id);
                let s3 = format!("com.amazonaws.{}.s3", self.region);
                let has = items(&endpoints["vpcEndpointSet"]).any(|endpoint| {
                    let tables = list(&endpoint["routeTableIdSet"]);
                    endpoint["vpcEndpointType"] == "Gateway"
                        && text_of(&endpoint["serviceName"]).ends_with(&s3)
                        && tables.iter().any(|one| text_of(one) == table)
                });
                rules::s3_way(has, &route, vpc, &self.region)
            });
        }
    }

    async fn concurrency(&self, report: &mut Report) {
        let answer = self.lambda.get_account_settings().send().await;
        let limits = answer.map_err(failed("lambda:GetAccountSettings"));
        report.judge("Lambda concurrency", limits, |answer| {
            let limit = answer.account_limit();
            let total = limit.map_or(0, |limit| limit.concurrent_executions());
            let unreserved = limit.and_then(|limit| limit.unreserved_concurrent_executions());
            let reserves = self.parameter("ReserveScalerConcurrency") == "true";
            let has_lane = match self.parameter("ExpressLane") {
                "auto" => self.parameter("ModelName") != "ViT-L/14",
                other => other == "on",
            };
            let lane = self.parameter("ExpressMaxConcurrency").parse();
            let lane = lane.ok().filter(|_| has_lane).unwrap_or(0);
            let unreserved = unreserved.unwrap_or(0);
            rules::concurrency(total, unreserved, reserves, self.is_deployed, lane)
        });
    }

    async fn buckets(&self, report: &mut Report) {
        let mut buckets = Vec::new();
        for (_, name) in self.numbered("SourceBucket") {
            buckets.push((
                name,
                "images",
                self.parameter("SourceEvents") == "EventBridge",
            ));
        }
        buckets.push((self.parameter("ModelBucket"), "model", false));
        buckets.push((self.parameter("CacheBucketName"), "vectors", false));
        for (name, purpose, notifies) in buckets.into_iter().filter(|(name, ..)| !name.is_empty()) {
            let known = match self.bucket_region(name).await {
                Ok(region) if notifies && region.as_ref() == Some(&self.region) => {
                    let asked = self.s3.get_bucket_notification_configuration().bucket(name);
                    let answer = asked.send().await;
                    answer
                        .map(|answer| answer.event_bridge_configuration().is_some())
                        .map(|is_on| (region, Notifications::EventBridge { is_on }))
                        .map_err(failed("s3:GetBucketNotification"))
                }
                region => region.map(|region| (region, Notifications::NotNeeded)),
            };
            report.judge(
                format!("bucket {name} ({purpose})"),
                known,
                |(region, events)| rules::bucket(name, region.as_deref(), &self.region, events),
            );
        }
    }

    /// `None` where there is no such bucket.
    async fn bucket_region(&self, name: &str) -> Result<Option<String>, Error> {
        match self.s3.head_bucket().bucket(name).send().await {
            Ok(answer) => Ok(Some(
                answer.bucket_region().unwrap_or(&self.region).to_owned(),
            )),
            Err(error) => {
                // Another region's answer is a redirection that names it.
                let answer = error.raw_response();
                let region = answer.and_then(|raw| raw.headers().get("x-amz-bucket-region"));
                let region = region.map(str::to_owned);
                let error = failed("s3:HeadBucket")(error);
                match (error.kind, region) {
                    (ErrorKind::NotFound, _) => Ok(None),
                    (_, Some(region)) if region != self.region => Ok(Some(region)),
                    _ => Err(error),
                }
            }
        }
    }

    fn keys(&self, report: &mut Report) {
        let users = |service: String, actions| KeyUser {
            kind: "Service",
            name: service,
            actions,
        };
        let volumes = KeyUser {
            kind: "AWS",
            name: "role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
                .to_owned(),
            actions: VOLUMES,
        };
        let own = self.parameter("KmsKeyArn");
        if own.is_empty() {
            let default = self.reader.read("ec2:GetEbsDefaultKmsKeyId", &json!({}));
            match default.map(|answer| text_of(&answer["kmsKeyId"])) {
                Ok(key) if key.ends_with("alias/aws/ebs") => {
                    report.add("default key of volumes", Judgement::pass("AWS's own"));
                }
                Ok(key) => self.key(
                    format!("default key of volumes {key}"),
                    &key,
                    &[volumes],
                    report,
                ),
                Err(error) => report.add("default key of volumes", unknown(&error)),
            }
        } else {
            let mut all = vec![
                users(format!("logs.{}.amazonaws.com", self.region), LOGS),
                volumes,
            ];
            let also = [
                ("events", self.parameter("SourceEvents") == "EventBridge"),
                ("cloudwatch", !self.parameter("AlarmEmail").is_empty()),
                ("sns", !self.parameter("SourceTopicArn").is_empty()),
            ];
            let also = also.iter().filter(|(_, is_needed)| *is_needed);
            all.extend(also.map(|(name, _)| users(format!("{name}.amazonaws.com"), DATA_KEY)));
            self.key("KmsKeyArn".to_owned(), own, &all, report);
        }
        let source = self.parameter("SourceKmsKeyArn");
        if !source.is_empty() {
            self.key("SourceKmsKeyArn".to_owned(), source, &[], report);
        }
    }

    fn key(&self, check: String, key: &str, users: &[KeyUser], report: &mut Report) {
        let known = self.reader.read("kms:DescribeKey", &json!({"KeyId": key}));
        let known = known.and_then(|answer| {
            let metadata = &answer["KeyMetadata"];
            let policy = match users {
                [] => Value::Null,
                _ => {
                    let input = json!({"KeyId": metadata["KeyId"], "PolicyName": "default"});
                    self.reader.read("kms:GetKeyPolicy", &input)?["Policy"].clone()
                }
            };
            let policy = serde_json::from_str(&text_of(&policy)).unwrap_or_default();
            Ok((text_of(&metadata["KeyState"]), policy))
        });
        report.judge(check, known, |(state, policy)| {
            rules::key(&state, &policy, users)
        });
    }

    fn image(&self, report: &mut Report) {
        let name = self.parameter("ImageRepository");
        let reference = self.parameter("ImageReference");
        let id = match reference.strip_prefix('@') {
            Some(digest) => json!({"imageDigest": digest}),
            None => json!({"imageTag": reference.trim_start_matches(':')}),
        };
        let input = json!({"repositoryName": name, "imageIds": [id]});
        let known = match self.reader.read("ecr:DescribeImages", &input) {
            Ok(answer) => Ok(answer["imageDetails"][0]["imageSizeInBytes"].as_u64()),
            Err(error)
                if ["RepositoryNotFoundException", "ImageNotFoundException"]
                    .contains(&error.code.as_str()) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        };
        report.judge("image", known, |bytes| rules::image(name, reference, bytes));
    }

    async fn model(&self, read: bool, report: &mut Report) {
        let (bucket, prefix) = (self.parameter("ModelBucket"), self.parameter("ModelPrefix"));
        let check = format!("model s3://{bucket}/{prefix}");
        let missing = || {
            let advice = "make and upload it: infra/README.md, \"Deploy\", step 1";
            Judgement::fail(format!("no {MANIFEST} there"), advice)
        };
        let json = match self.object(bucket, &format!("{prefix}/{MANIFEST}")).await {
            Ok(Some(json)) => json,
            Ok(None) => return report.add(check, missing()),
            Err(error) => return report.add(check, unknown(&error)),
        };
        let manifest: Manifest = match serde_json::from_slice(&json) {
            Ok(manifest) => manifest,
            Err(error) => {
                let advice = "build and upload it again with this version";
                let says = format!("its {MANIFEST} is malformed: {error}");
                return report.add(check, Judgement::fail(says, advice));
            }
        };
        let mut stored = BTreeMap::new();
        for name in manifest.files.keys() {
            match self.stored(bucket, &format!("{prefix}/{name}"), read).await {
                Ok(Some(found)) => drop(stored.insert(name.clone(), found)),
                Ok(None) => {}
                Err(error) => return report.add(check, unknown(&error)),
            }
        }
        let labels = self.parameter("ExtractLabels") == "true";
        let found = |name: &str| stored.get(name).cloned();
        report.add(
            check,
            rules::model(&manifest, self.parameter("ModelName"), labels, found),
        );
    }

    async fn object(&self, bucket: &str, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let answer = self.s3.get_object().bucket(bucket).key(key).send().await;
        let broken = |error| Error::network("s3:GetObject", "BadResponse", &error);
        match absent(answer.map_err(failed("s3:GetObject")))? {
            None => Ok(None),
            Some(answer) => Ok(Some(answer.body.collect().await.map_err(broken)?.to_vec())),
        }
    }

    async fn stored(&self, bucket: &str, key: &str, read: bool) -> Result<Option<Stored>, Error> {
        if !read {
            let answer = self.s3.head_object().bucket(bucket).key(key).send().await;
            let answer = absent(answer.map_err(failed("s3:HeadObject")))?;
            return Ok(answer.map(|answer| Stored {
                bytes: answer.content_length().unwrap_or(0).unsigned_abs(),
                sha256: None,
            }));
        }
        let answer = self.s3.get_object().bucket(bucket).key(key).send().await;
        let Some(mut answer) = absent(answer.map_err(failed("s3:GetObject")))? else {
            return Ok(None);
        };
        let (mut digest, mut bytes) = (Sha256::new(), 0);
        while let Some(part) = answer.body.next().await {
            let part =
                part.map_err(|error| Error::network("s3:GetObject", "BadResponse", &error))?;
            digest.update(&part);
            bytes += part.len() as u64;
        }
        let sha256 = Some(hex::encode(digest.finalize()));
        Ok(Some(Stored { bytes, sha256 }))
    }

    async fn stack(&self, name: &str, stack: &Value, report: &mut Report) {
        let reason = text_of(&stack["StackStatusReason"]);
        report.add(
            format!("stack {name}"),
            rules::status(&text_of(&stack["StackStatus"]), &reason),
        );
        let input = json!({"StackName": name});
        let resources = match self
            .reader
            .read("cloudformation:DescribeStackResources", &input)
        {
            Ok(answer) => answer["StackResources"].clone(),
            Err(error) => return report.add("resources", unknown(&error)),
        };
        let of_type = |kind: &'static str| {
            let all = items(&resources).filter(move |one| one["ResourceType"] == kind);
            all.map(|one| {
                (
                    text_of(&one["LogicalResourceId"]),
                    text_of(&one["PhysicalResourceId"]),
                )
            })
        };
        let mut sound = 0;
        for resource in items(&resources) {
            let reason = text_of(&resource["ResourceStatusReason"]);
            let judgement = rules::status(&text_of(&resource["ResourceStatus"]), &reason);
            match judgement.verdict {
                Verdict::Pass => sound += 1,
                _ => report.add(text_of(&resource["LogicalResourceId"]), judgement),
            }
        }
        report.add(
            "resources",
            Judgement::pass(format!("{sound} are as they should be")),
        );
        for (logical, id) in of_type("AWS::Lambda::Function") {
            let asked = self.lambda.get_function_configuration().function_name(id);
            let answer = asked.send().await;
            let answer = answer.map_err(failed("lambda:GetFunctionConfiguration"));
            report.judge(logical, answer, |answer| {
                let state = answer.state().map_or("", |state| state.as_str());
                let update = answer
                    .last_update_status()
                    .map_or("", |status| status.as_str());
                rules::function(state, update)
            });
        }
        for (logical, id) in of_type("AWS::AutoScaling::AutoScalingGroup") {
            let input = json!({"AutoScalingGroupName": id, "MaxRecords": 1});
            let answer = self
                .reader
                .read("autoscaling:DescribeScalingActivities", &input);
            report.judge(logical, answer, |answer| {
                let newest = items(&answer["Activities"]).next();
                let newest =
                    newest.map(|one| (text_of(&one["StatusCode"]), text_of(&one["StatusMessage"])));
                rules::launches(
                    newest
                        .as_ref()
                        .map(|(code, says)| (code.as_str(), says.as_str())),
                )
            });
        }
        let names: Vec<String> = of_type("AWS::CloudWatch::Alarm")
            .map(|(_, id)| id)
            .collect();
        let input = json!({"AlarmNames.member": names, "StateValue": "ALARM"});
        let answer = self.reader.read("cloudwatch:DescribeAlarms", &input);
        report.judge("alarms", answer, |answer| {
            let ringing = items(&answer["MetricAlarms"]);
            let ringing = ringing.map(|alarm| {
                (
                    text_of(&alarm["AlarmName"]),
                    text_of(&alarm["AlarmDescription"]),
                )
            });
            rules::alarms(&ringing.collect::<Vec<_>>())
        });
    }
}

/// What a list has in it; an empty one came as text.
fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// `None` for what is not there.
fn absent<T>(answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        answer => answer.map(Some),
    }
}

/// The route table of a subnet (its own, else the VPC's main one) and where its default route leads.
fn default_route(tables: &Value, vpc: &str, subnet: &str) -> (String, DefaultRoute) {
    let of = |wanted: &dyn Fn(&Value) -> bool| {
        items(&tables["routeTableSet"])
            .filter(|table| text_of(&table["vpcId"]) == vpc)
            .find(|table| items(&table["associationSet"]).any(wanted))
    };
    let own = of(&|association| text_of(&association["subnetId"]) == subnet);
    let table = own.or_else(|| of(&|association| association["main"] == "true"));
    let Some(table) = table else {
        return (String::new(), DefaultRoute::None);
    };
    let mut routes = items(&table["routeSet"]);
    let default = routes.find(|route| route["destinationCidrBlock"] == "0.0.0.0/0");
    let Some(default) = default else {
        return (text_of(&table["routeTableId"]), DefaultRoute::None);
    };
    let targets = [
        "natGatewayId",
        "gatewayId",
        "transitGatewayId",
        "networkInterfaceId",
    ];
    let mut targets = targets.iter().map(|name| text_of(&default[*name]));
    let target = targets.find(|id| !id.is_empty()).unwrap_or_default();
    let route = match target.split('-').next() {
        _ if default["state"] == "blackhole" => DefaultRoute::Blackhole(target),
        Some("nat") => DefaultRoute::Nat,
        Some("igw") => DefaultRoute::InternetGateway,
        _ => DefaultRoute::Other(target),
    };
    (text_of(&table["routeTableId"]), route)
}

/// Services with an interface endpoint of the VPC that answers under AWS's own name.
fn interfaces(endpoints: &Value, vpc: &str, region: &str) -> rules::Endpoints {
    let prefix = format!("com.amazonaws.{region}.");
    let answers = |endpoint: &&Value| {
        text_of(&endpoint["vpcId"]) == vpc
            && endpoint["vpcEndpointType"] == "Interface"
            && endpoint["privateDnsEnabled"] == "true"
            && text_of(&endpoint["state"]).eq_ignore_ascii_case("available")
    };
    let names = items(&endpoints["vpcEndpointSet"]).filter(answers);
    let names = names.map(|endpoint| text_of(&endpoint["serviceName"]));
    names
        .filter_map(|name| Some(name.split_once(&prefix)?.1.to_owned()))
        .collect()
}
