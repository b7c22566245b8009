//! What the local deployment's resources are called: `clip-<LogicalId>`, in the
//! form that each service has.

use ministack::{ACCOUNT, REGION};
use template::Surroundings;

/// The stack's name, the beginning of every physical name.
const STACK: &str = "clip";

pub fn name(logical_id: &str) -> String {
    format!("{STACK}-{logical_id}")
}

pub(super) fn bucket(logical_id: &str) -> String {
    name(logical_id).to_lowercase()
}

pub(super) fn arn(service: &str, resource: &str) -> String {
    format!("arn:aws:{service}:{REGION}:{ACCOUNT}:{resource}")
}

pub(super) fn queue_url(endpoint: &str, name: &str) -> String {
    format!("{endpoint}/{ACCOUNT}/{name}")
}

pub(super) struct Names<'a> {
    pub endpoint: &'a str,
    /// The newest revision, which only its registration tells.
    pub task_definition: &'a str,
}

impl Surroundings for Names<'_> {
    fn reference(&self, logical_id: &str, kind: &str) -> Option<String> {
        let name = name(logical_id);
        Some(match kind {
            "AWS::S3::Bucket" => bucket(logical_id),
            "AWS::SQS::Queue" => queue_url(self.endpoint, &name),
            "AWS::SNS::Topic" => arn("sns", &name),
            "AWS::ECS::TaskDefinition" => self.task_definition.to_owned(),
            _ => name,
        })
    }

    fn attribute(&self, logical_id: &str, kind: &str, attribute: &str) -> Option<String> {
        let name = name(logical_id);
        Some(match (kind, attribute) {
            ("AWS::SQS::Queue", "Arn") => arn("sqs", &name),
            ("AWS::SNS::Topic", "TopicArn") => arn("sns", &name),
            ("AWS::S3::Bucket", "Arn") => format!("arn:aws:s3:::{}", bucket(logical_id)),
            ("AWS::Serverless::Function" | "AWS::Lambda::Function", "Arn") => {
                arn("lambda", &format!("function:{name}"))
            }
            ("AWS::ECS::Cluster", "Arn") => arn("ecs", &format!("cluster/{name}")),
            ("AWS::Events::Rule", "Arn") => arn("events", &format!("rule/{name}")),
            ("AWS::IAM::Role", "Arn") => format!("arn:aws:iam::{ACCOUNT}:role/{name}"),
            (_, "QueueName" | "TopicName" | "RoleName") => name,
            _ => format!("{name}.{attribute}"),
        })
    }

    fn pseudo(&self, name: &str) -> Option<String> {
        Some(match name {
            "Region" => REGION.to_owned(),
            "AccountId" => ACCOUNT.to_owned(),
            "Partition" => "aws".to_owned(),
            "URLSuffix" => "amazonaws.com".to_owned(),
            "StackName" => STACK.to_owned(),
            "StackId" => arn("cloudformation", &format!("stack/{STACK}/local")),
            _ => return None,
        })
    }
}
