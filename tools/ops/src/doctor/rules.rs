//! What the facts mean: no call is made here.

use std::collections::BTreeSet;

use clip_model::{Manifest, Precision};
use serde::Serialize;
use serde_json::Value;

/// Lambda keeps so many concurrent executions that cannot be reserved.
const LEAST_UNRESERVED: i32 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Pass,
    Fail,
    CannotTell,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Judgement {
    pub verdict: Verdict,
    pub says: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Judgement {
    fn new(verdict: Verdict, says: impl Into<String>, advice: Option<String>) -> Self {
        let says = says.into();
        Self {
            verdict,
            says,
            advice,
        }
    }

    pub fn pass(says: impl Into<String>) -> Self {
        Self::new(Verdict::Pass, says, None)
    }

    /// Good, and could be better.
    fn pass_but(says: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Verdict::Pass, says, Some(advice.into()))
    }

    pub fn fail(says: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Verdict::Fail, says, Some(advice.into()))
    }

    pub fn cannot_tell(why: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Verdict::CannotTell, why, Some(advice.into()))
    }
}

/// How instances are bought; each has a quota of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purchase {
    OnDemand,
    Spot,
}

impl Purchase {
    /// The quota of G and VT instances, in vCPUs.
    pub const fn quota_code(self) -> &'static str {
        match self {
            Purchase::OnDemand => "L-DB2E81BA",
            Purchase::Spot => "L-3819A6DF",
        }
    }
}

/// Whether the two quotas are about this type.
pub fn is_g_or_vt(instance_type: &str) -> bool {
    let family = instance_type.trim_start_matches(|c: char| c.is_ascii_lowercase());
    let family = &instance_type[..instance_type.len() - family.len()];
    matches!(family, "g" | "gr" | "vt")
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub name: String,
    pub vcpus: u32,
    pub has_nvidia: bool,
    pub is_x86: bool,
}

pub fn machine(machine: &Machine) -> Judgement {
    if machine.has_nvidia && machine.is_x86 {
        return Judgement::pass(format!("{} vCPUs, an NVIDIA GPU", machine.vcpus));
    }
    let advice = "take a type with an NVIDIA GPU and an x86-64 processor, such as g4dn.xlarge";
    Judgement::fail("no NVIDIA GPU, or no x86-64 processor", advice)
}

/// Whether `quota` vCPUs let the wanted machines run.
pub fn quota(purchase: Purchase, quota: u32, machines: &[Machine], most: u32) -> Judgement {
    let sizes = machines.iter().map(|machine| machine.vcpus);
    let (Some(least), Some(largest)) = (sizes.clone().min(), sizes.max()) else {
        return Judgement::pass(format!("{quota} vCPUs, and nothing is bought so"));
    };
    let all = most.saturating_mul(largest);
    let ask = format!(
        "aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {} \
         --desired-value {all}",
        purchase.quota_code()
    );
    let says =
        format!("{quota} vCPUs; an instance has {least} to {largest}, MaxInstances is {most}");
    match quota {
        _ if quota < least => Judgement::fail(says, ask),
        _ if quota < all => Judgement::pass_but(says, format!("for all at once: {ask}")),
        _ => Judgement::pass(says),
    }
}

/// Whether the account has room for what the stack reserves, and for `lane`
/// express functions beside intake and scaler.
pub fn concurrency(
    limit: i32,
    unreserved: i32,
    reserves: bool,
    is_deployed: bool,
    lane: i32,
) -> Judgement {
    let says = format!("{limit} concurrent executions, {unreserved} of them unreserved");
    let wanted = LEAST_UNRESERVED + i32::from(!is_deployed);
    if reserves && unreserved < wanted {
        let advice =
            "deploy with ReserveScalerConcurrency=false, or ask for more (quota L-B99A9384)";
        return Judgement::fail(says, advice);
    }
    if lane > 0 && unreserved < lane + 2 {
        let advice = format!(
            "ExpressMaxConcurrency={lane} leaves none for intake and scaler: take less, or ask for \
             more (quota L-B99A9384)"
        );
        return Judgement::fail(says, advice);
    }
    if limit < LEAST_UNRESERVED {
        let advice = "enough, but floods of events wait longer: ask for 1000 (quota L-B99A9384)";
        return Judgement::pass_but(says, advice);
    }
    Judgement::pass(says)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subnet {
    pub id: String,
    pub vpc: String,
    pub zone: String,
    pub gives_public_addresses: bool,
}

/// `found` of the subnets that were asked for.
pub fn subnets(vpc: &str, asked: &[&str], found: &[Subnet]) -> Judgement {
    let advice = "PrivateSubnet1 to 3 are subnets of VpcId, each in another Availability Zone";
    for id in asked {
        match found.iter().find(|subnet| subnet.id == *id) {
            None => return Judgement::fail(format!("{id} does not exist here"), advice),
            Some(subnet) if subnet.vpc != vpc => {
                return Judgement::fail(format!("{id} lies in {}, not {vpc}", subnet.vpc), advice);
            }
            Some(_) => {}
        }
    }
    let zones: BTreeSet<_> = found.iter().map(|subnet| subnet.zone.as_str()).collect();
    let zones_text = Vec::from_iter(zones.iter().copied()).join(", ");
    if zones.len() < found.len() {
        let says = format!("{} subnets lie in {zones_text} alone", found.len());
        return Judgement::fail(says, advice);
    }
    match zones.len() {
        1 => Judgement::pass_but(zones_text, "more zones find GPU capacity more often"),
        _ => Judgement::pass(zones_text),
    }
}

/// Whether a zone of the subnets has the type.
pub fn offered(zones: &BTreeSet<String>, subnets: &[Subnet]) -> Judgement {
    let (has, lacks): (Vec<&Subnet>, Vec<&Subnet>) = subnets
        .iter()
        .partition(|subnet| zones.contains(&subnet.zone));
    let names = |subnets: Vec<&Subnet>| {
        let names: Vec<_> = subnets
            .into_iter()
            .map(|subnet| subnet.zone.as_str())
            .collect();
        names.join(", ")
    };
    let all = Vec::from_iter(zones.iter().map(String::as_str)).join(", ");
    if has.is_empty() {
        let says = format!("not offered in {}", names(lacks));
        let advice = match zones.is_empty() {
            true => "take another type or region".to_owned(),
            false => format!("take a subnet in {all}, or another type"),
        };
        return Judgement::fail(says, advice);
    }
    let says = format!("offered in {}", names(has));
    match lacks.is_empty() {
        true => Judgement::pass(says),
        false => Judgement::pass_but(says, format!("not in {}; it is in {all}", names(lacks))),
    }
}

pub fn dns(support: bool, host_names: bool) -> Judgement {
    if support && host_names {
        return Judgement::pass("resolution and host names are on");
    }
    Judgement::fail(
        "resolution or host names are off: the model cache cannot be mounted",
        "aws ec2 modify-vpc-attribute --enable-dns-support (then --enable-dns-hostnames) --vpc-id VPC",
    )
}

/// Where a subnet's default route leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DefaultRoute {
    None,
    /// What it led to is gone.
    Blackhole(String),
    Nat,
    InternetGateway,
    /// A transit gateway, an appliance and so on.
    Other(String),
}

/// An interface endpoint that instances of the VPC find by AWS's own names.
pub type Endpoints = BTreeSet<String>;

/// Whether an instance in the subnet reaches AWS's APIs.
pub fn way_out(
    route: &DefaultRoute,
    subnet: &Subnet,
    has: &Endpoints,
    needs: &[&str],
) -> Judgement {
    let missing: Vec<&str> = needs
        .iter()
        .copied()
        .filter(|need| !has.contains(*need))
        .collect();
    if missing.is_empty() {
        return Judgement::pass("by interface endpoints");
    }
    let advice = format!(
        "add a NAT gateway and a default route to it, or interface endpoints with private DNS for {}",
        missing.join(", ")
    );
    match route {
        DefaultRoute::Nat => Judgement::pass("by a NAT gateway"),
        DefaultRoute::InternetGateway if subnet.gives_public_addresses => {
            Judgement::pass("by public addresses and an internet gateway")
        }
        DefaultRoute::InternetGateway => Judgement::fail(
            "the default route is an internet gateway, and instances get no public address",
            advice,
        ),
        DefaultRoute::Other(target) => Judgement::cannot_tell(
            format!("the default route leads to {target}"),
            "make sure that AWS's APIs are reached through it",
        ),
        DefaultRoute::Blackhole(target) => Judgement::fail(
            format!("the default route leads to {target}, which is gone"),
            advice,
        ),
        DefaultRoute::None => {
            Judgement::fail("no default route, and endpoints are missing", advice)
        }
    }
}

/// Images, vectors and the container's layers go to S3.
pub fn s3_way(
    has_gateway_endpoint: bool,
    route: &DefaultRoute,
    vpc: &str,
    region: &str,
) -> Judgement {
    let advice = format!(
        "aws ec2 create-vpc-endpoint --vpc-id {vpc} --service-name com.amazonaws.{region}.s3 \
         --route-table-ids TABLE (it is free)"
    );
    match route {
        _ if has_gateway_endpoint => Judgement::pass("by a gateway endpoint"),
        DefaultRoute::Nat => Judgement::fail(
            "no gateway endpoint: everything goes through NAT at $0.045 a GB",
            advice,
        ),
        DefaultRoute::InternetGateway | DefaultRoute::Other(_) => {
            Judgement::pass_but("by the default route", advice)
        }
        _ => Judgement::fail("no gateway endpoint and no other way", advice),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notifications {
    NotNeeded,
    EventBridge { is_on: bool },
}

/// A bucket's region, `None` when there is no such bucket.
pub fn bucket(
    name: &str,
    region: Option<&str>,
    wanted_region: &str,
    notifications: Notifications,
) -> Judgement {
    match (region, notifications) {
        (None, _) => Judgement::fail("no such bucket", format!("aws s3 mb s3://{name}")),
        (Some(region), _) if region != wanted_region => Judgement::fail(
            format!("in {region}, and the stack's region is {wanted_region}"),
            "take a bucket in the stack's region, or deploy there",
        ),
        (Some(_), Notifications::EventBridge { is_on: false }) => Judgement::fail(
            "sends no events to EventBridge",
            "turn it on: console, the bucket's Properties, Amazon EventBridge, On",
        ),
        (Some(_), Notifications::EventBridge { is_on: true }) => {
            Judgement::pass("there, and sends its events to EventBridge")
        }
        (Some(_), Notifications::NotNeeded) => Judgement::pass("there"),
    }
}

/// A service that uses a key by itself, and must be in the key's policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyUser {
    /// As in the policy's `Principal`: `Service` or `AWS`.
    pub kind: &'static str,
    /// What the principal ends with.
    pub name: String,
    pub actions: &'static [&'static str],
}

/// A key's state and policy. Conditions are not evaluated: the template's own
/// uses meet those that AWS's documentation gives.
pub fn key(state: &str, policy: &Value, users: &[KeyUser]) -> Judgement {
    if state != "Enabled" {
        let advice = "enable it, or take another: nothing encrypted with it can be read";
        return Judgement::fail(format!("the key is {state}"), advice);
    }
    let lacking: Vec<String> = users
        .iter()
        .flat_map(|user| {
            let refused = user
                .actions
                .iter()
                .filter(|action| !allows(policy, user, action));
            refused.map(|action| format!("{action} for {}", user.name))
        })
        .collect();
    if lacking.is_empty() {
        return Judgement::pass(match users {
            [] => "enabled",
            _ => "enabled, and its policy lets the services in",
        });
    }
    Judgement::fail(
        format!("its policy does not allow {}", lacking.join(", ")),
        "add the statements of infra/README.md, \"A key of your own\"",
    )
}

fn allows(policy: &Value, user: &KeyUser, action: &str) -> bool {
    let matching = |statement: &&Value| {
        let principal = &statement["Principal"];
        let principals = texts(&principal[user.kind]);
        let is_named = principals
            .iter()
            .any(|one| *one == "*" || one.ends_with(&user.name));
        let actions = texts(&statement["Action"]);
        (principal == "*" || is_named) && actions.iter().any(|pattern| fits(pattern, action))
    };
    let statements = template::list(&policy["Statement"]);
    let effects: Vec<&Value> = statements
        .into_iter()
        .filter(matching)
        .filter(|statement| statement["Effect"] == "Allow" || statement["Condition"].is_null())
        .map(|statement| &statement["Effect"])
        .collect();
    effects.iter().any(|effect| *effect == "Allow")
        && effects.iter().all(|effect| *effect != "Deny")
}

fn texts(value: &Value) -> Vec<&str> {
    let values = template::list(value).into_iter();
    values.filter_map(Value::as_str).collect()
}

/// Whether a policy's pattern of actions has this one in it.
fn fits(pattern: &str, action: &str) -> bool {
    let pattern = regex_lite::escape(pattern)
        .replace(r"\*", ".*")
        .replace(r"\?", ".");
    let pattern = regex_lite::Regex::new(&format!("(?i)^{pattern}$"));
    pattern.is_ok_and(|pattern| pattern.is_match(action))
}

/// The image's size in bytes, `None` when it is not there.
pub fn image(name: &str, reference: &str, bytes: Option<u64>) -> Judgement {
    let Some(bytes) = bytes else {
        return Judgement::fail(
            format!("no {name}{reference} in this account and region"),
            "build and push it: infra/README.md, \"Deploy\", step 2",
        );
    };
    let says = format!("there, {} MB", bytes / 1_000_000);
    match reference.starts_with('@') {
        true => Judgement::pass(says),
        false => Judgement::pass_but(says, "a tag may move between tasks: deploy its digest"),
    }
}

/// What was found of a bundle's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub bytes: u64,
    /// Where it was read.
    pub sha256: Option<String>,
}

/// A bundle, by its manifest and what `stored` finds of each file.
pub fn model(
    manifest: &Manifest,
    wanted: &str,
    wants_labels: bool,
    stored: impl Fn(&str) -> Option<Stored>,
) -> Judgement {
    let rebuild = "build and upload it again: infra/README.md, \"Deploy\", step 1";
    let fail = |says: String| Judgement::fail(says, rebuild);
    if manifest.format != clip_model::bundle::FORMAT {
        return fail(format!("format {} is another version's", manifest.format));
    }
    if manifest.model != wanted {
        return fail(format!(
            "it is {}, and ModelName is {wanted}",
            manifest.model
        ));
    }
    if manifest.precision != Precision::Fp16 {
        return fail(format!(
            "it is in {}, which is slow on a GPU or refused there: --precision fp16",
            manifest.precision
        ));
    }
    if manifest.is_synthesized() {
        return fail(format!("its weights are {}", manifest.weights));
    }
    if wants_labels && manifest.labels.is_none() {
        return Judgement::fail(
            "it has no labels, and ExtractLabels is true",
            "build it without --no-labels, or deploy with ExtractLabels=false",
        );
    }
    let mut is_read = true;
    for (name, digest) in &manifest.files {
        match stored(name) {
            None => return fail(format!("{name} is missing")),
            Some(found) if found.bytes != digest.bytes => {
                let (found, wanted) = (found.bytes, digest.bytes);
                return fail(format!(
                    "{name} has {found} bytes, and should have {wanted}"
                ));
            }
            Some(found) => match &found.sha256 {
                Some(sha256) if *sha256 != digest.sha256 => {
                    return fail(format!("{name} has sha256 {sha256}, not the manifest's"));
                }
                sha256 => is_read &= sha256.is_some(),
            },
        }
    }
    let says = format!("{wanted} in fp16, {} files", manifest.files.len());
    match is_read {
        true => Judgement::pass(format!("{says}, digests right")),
        false => Judgement::pass_but(
            format!("{says}, sizes right"),
            "--read-model compares the digests too, as each task does before it uses them",
        ),
    }
}

/// A stack or a resource in it, by CloudFormation's status.
pub fn status(status: &str, reason: &str) -> Judgement {
    let says = match reason {
        "" => status.to_owned(),
        reason => format!("{status}: {reason}"),
    };
    let is_undone = ["ROLLBACK", "DELETE"]
        .iter()
        .any(|word| status.contains(word));
    match status {
        _ if status.ends_with("_IN_PROGRESS") => {
            Judgement::cannot_tell(says, "wait for its end, and ask again")
        }
        _ if status.ends_with("_COMPLETE") && !is_undone => Judgement::pass(says),
        _ => Judgement::fail(
            says,
            "the first failure says why: aws cloudformation describe-stack-events --stack-name STACK",
        ),
    }
}

/// The newest activity of an Auto Scaling group.
pub fn launches(newest: Option<(&str, &str)>) -> Judgement {
    match newest {
        Some(("Failed" | "Cancelled", message)) => Judgement::fail(
            format!("the last launch failed: {message}"),
            "infra/README.md, \"An instance never registers\"",
        ),
        Some((status, _)) => Judgement::pass(format!("the last launch: {status}")),
        None => Judgement::pass("nothing was launched in the last six weeks"),
    }
}

/// Alarms that are ringing, with what they mean.
pub fn alarms(ringing: &[(String, String)]) -> Judgement {
    if ringing.is_empty() {
        return Judgement::pass("none rings");
    }
    let names: Vec<&str> = ringing.iter().map(|(name, _)| name.as_str()).collect();
    let meanings: Vec<&str> = ringing
        .iter()
        .map(|(_, meaning)| meaning.as_str())
        .collect();
    Judgement::fail(format!("{} ring", names.join(", ")), meanings.join(" "))
}

/// A function's state and what its last update came to.
pub fn function(state: &str, update: &str) -> Judgement {
    match (state, update) {
        ("Active" | "Inactive", "Successful" | "") => Judgement::pass(state),
        _ => Judgement::fail(
            format!("{state}, its last update: {update}"),
            "aws lambda get-function-configuration says why; deploy again",
        ),
    }
}
