//! The wire contract as the template repeats it.

use std::collections::BTreeSet;

use events::ImageType;
use serde_json::{Value, json};

use super::in_each_stack;
use crate::{Findings, Project};
use template::{list, referred};

/// The input queue's subscription takes exactly what the contract says, raw.
pub fn subscription(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        for (id, subscription) in stack.of_type("AWS::SNS::Subscription") {
            if referred(&subscription["Endpoint"]) != Some("InputQueue") {
                continue;
            }
            let mut fail = |problem: &str| findings.add(id, problem);
            if subscription["FilterPolicy"] != project.subscription_filter {
                fail("FilterPolicy differs from events/filters/subscription.json");
            }
            if subscription["FilterPolicyScope"] != "MessageBody" {
                fail("FilterPolicyScope must be MessageBody: the messages have no attributes");
            }
            if subscription["RawMessageDelivery"] != true {
                fail("RawMessageDelivery must be true: the message is the CloudEvent");
            }
        }
        if stack.name == "everything on" && stack.of_type("AWS::SNS::Subscription").next().is_none()
        {
            findings.add("SourceSubscription", "there is none");
        }
    });
    let example = project
        .example
        .part("/Resources/EmbeddedSubscription/Properties");
    if example["FilterPolicy"] != project.vector_store_filter {
        findings.add(
            "infra/examples/existing-bucket.yaml",
            "FilterPolicy differs from events/filters/vector-store.json",
        );
    }
    let types: BTreeSet<&str> = ImageType::ALL.iter().map(|kind| kind.mime()).collect();
    let filter = &project.subscription_filter;
    let listed: BTreeSet<&str> = list(&filter["data"]["document"]["type"])
        .into_iter()
        .filter_map(Value::as_str)
        .collect();
    if listed != types || filter["type"] != json!(["document-created"]) {
        findings.add(
            "events/filters/subscription.json",
            "must name document-created and every supported image type",
        );
    }
}
