//! Signed reads of AWS. The SDK's crates for EC2, CloudFormation, CloudWatch,
//! Auto Scaling, KMS, ECR and Service Quotas would be compiled for one or two
//! calls each; their protocols are two.

use std::time::{Duration, SystemTime};

use anyhow::Context;
use aws_config::SdkConfig;
use aws_credential_types::provider::ProvideCredentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use aws_smithy_runtime_api::client::identity::Identity;
use platform::aws::Error;
use serde_json::{Map, Value};
use ureq::Agent;
use ureq::http::Request;

/// One call. None of them walks long lists.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

enum Protocol {
    /// Fields in, XML out: the API's version.
    Query(&'static str),
    /// JSON both ways: what precedes the action in `X-Amz-Target`.
    Json(&'static str),
}

struct Service {
    /// As in operations and permissions.
    name: &'static str,
    host: &'static str,
    signs_as: &'static str,
    /// After `AWS_ENDPOINT_URL_`.
    endpoint: &'static str,
    protocol: Protocol,
}

#[rustfmt::skip]
const SERVICES: &[Service] = &[
    Service { name: "ec2", host: "ec2", signs_as: "ec2", endpoint: "EC2", protocol: Protocol::Query("2016-11-15") },
    Service { name: "cloudformation", host: "cloudformation", signs_as: "cloudformation", endpoint: "CLOUDFORMATION", protocol: Protocol::Query("2010-05-15") },
    Service { name: "cloudwatch", host: "monitoring", signs_as: "monitoring", endpoint: "CLOUDWATCH", protocol: Protocol::Query("2010-08-01") },
    Service { name: "autoscaling", host: "autoscaling", signs_as: "autoscaling", endpoint: "AUTO_SCALING", protocol: Protocol::Query("2011-01-01") },
    Service { name: "kms", host: "kms", signs_as: "kms", endpoint: "KMS", protocol: Protocol::Json("TrentService") },
    Service { name: "ecr", host: "api.ecr", signs_as: "ecr", endpoint: "ECR", protocol: Protocol::Json("AmazonEC2ContainerRegistry_V20150921") },
    Service { name: "servicequotas", host: "servicequotas", signs_as: "servicequotas", endpoint: "SERVICE_QUOTAS", protocol: Protocol::Json("ServiceQuotasV20190624") },
];

pub struct Reader {
    agent: Agent,
    identity: Identity,
    region: String,
    endpoint: Option<String>,
}

impl Reader {
    pub async fn new(sdk: &SdkConfig) -> anyhow::Result<Self> {
        let provider = sdk.credentials_provider().context("no credentials")?;
        let credentials = provider
            .provide_credentials()
            .await
            .context("no credentials: `aws sts get-caller-identity` shows whether there are any")?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(CALL_TIMEOUT));
        Ok(Self {
            agent: config.build().into(),
            identity: credentials.into(),
            region: sdk.region().context("no region")?.to_string(),
            endpoint: sdk.endpoint_url().map(str::to_owned),
        })
    }

    /// The answer of `operation`, such as `ec2:DescribeSubnets`.
    pub fn read(&self, operation: &'static str, input: &Value) -> Result<Value, Error> {
        let unsendable =
            |problem: &str| Error::of_code(operation, "Unsendable", problem.to_owned());
        let (name, action) = operation.split_once(':').unwrap_or_default();
        let service = SERVICES.iter().find(|service| service.name == name);
        let service = service.ok_or_else(|| unsendable("not a known service"))?;
        let (body, headers) = match service.protocol {
            Protocol::Query(version) => {
                let mut form = form_urlencoded::Serializer::new(String::new());
                form.append_pair("Action", action)
                    .append_pair("Version", version);
                fields("", input, &mut |name, value| {
                    form.append_pair(name, value);
                });
                let kind = ("content-type", "application/x-www-form-urlencoded");
                (form.finish(), vec![(kind.0, kind.1.to_owned())])
            }
            Protocol::Json(prefix) => {
                let target = format!("{prefix}.{action}");
                let kind = "application/x-amz-json-1.1".to_owned();
                let headers = vec![("content-type", kind), ("x-amz-target", target)];
                (input.to_string(), headers)
            }
        };
        let request = self
            .signed(service, &body, &headers)
            .map_err(|error| unsendable(&format!("{error:#}")))?;
        let broken = |error: &ureq::Error| Error::network(operation, "Unreachable", error);
        let mut response =
            tokio::task::block_in_place(|| self.agent.run(request)).map_err(|e| broken(&e))?;
        let status = response.status();
        let text = response.body_mut().read_to_string();
        let text = text.map_err(|error| broken(&error))?;
        let answer = match service.protocol {
            Protocol::Query(_) => from_xml(&text),
            Protocol::Json(_) => serde_json::from_str(&text).ok(),
        };
        match answer {
            Some(answer) if status.is_success() => Ok(answer),
            answer => {
                let (code, message) = problem(&answer.unwrap_or_default());
                let message = message.unwrap_or_else(|| format!("HTTP {status} without a message"));
                Err(Error::of_code(operation, &code, message))
            }
        }
    }

    fn signed(
        &self,
        service: &Service,
        body: &str,
        headers: &[(&'static str, String)],
    ) -> anyhow::Result<Request<String>> {
        let given = std::env::var(format!("AWS_ENDPOINT_URL_{}", service.endpoint));
        let region = &self.region;
        let suffix = if region.starts_with("cn-") { ".cn" } else { "" };
        let endpoint = given.ok().or_else(|| self.endpoint.clone());
        let endpoint = endpoint
            .unwrap_or_else(|| format!("https://{}.{region}.amazonaws.com{suffix}", service.host));
        let url = format!("{}/", endpoint.trim_end_matches('/'));
        let mut request = Request::post(&url);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let mut request = request.body(body.to_owned())?;
        let params = v4::SigningParams::builder()
            .identity(&self.identity)
            .region(region)
            .name(service.signs_as)
            .time(SystemTime::now())
            .settings(SigningSettings::default())
            .build()?
            .into();
        let signed = headers.iter().map(|(name, value)| (*name, value.as_str()));
        let body = SignableBody::Bytes(body.as_bytes());
        let signable = SignableRequest::new("POST", &url, signed, body)?;
        let (instructions, _) = sign(signable, &params)?.into_parts();
        instructions.apply_to_request_http1x(&mut request);
        Ok(request)
    }
}

/// Lists and structures as the fields of a form: `Filter.1.Name`.
fn fields(name: &str, value: &Value, add: &mut impl FnMut(&str, &str)) {
    let below = |part: &str| match name {
        "" => part.to_owned(),
        name => format!("{name}.{part}"),
    };
    match value {
        Value::Object(members) => {
            for (member, value) in members {
                fields(&below(member), value, add);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                fields(&below(&(index + 1).to_string()), value, add);
            }
        }
        Value::String(text) => add(name, text),
        other => add(name, &other.to_string()),
    }
}

/// An answer in XML as JSON: what has only `item`s or `member`s is a list, and
/// what has nothing within is text (an empty list, too).
fn from_xml(text: &str) -> Option<Value> {
    let document = roxmltree::Document::parse(text).ok()?;
    let answer = value(document.root_element());
    let only = answer.as_object()?.iter().next();
    match only {
        Some((name, result)) if name.ends_with("Result") => Some(result.clone()),
        _ => Some(answer),
    }
}

fn value(node: roxmltree::Node<'_, '_>) -> Value {
    let children: Vec<_> = node.children().filter(|child| child.is_element()).collect();
    let is_item =
        |child: &roxmltree::Node<'_, '_>| matches!(child.tag_name().name(), "item" | "member");
    if children.is_empty() {
        return Value::from(node.text().unwrap_or_default());
    }
    if children.iter().all(is_item) {
        return children.into_iter().map(value).collect();
    }
    let member =
        |child: roxmltree::Node<'_, '_>| (child.tag_name().name().to_owned(), value(child));
    Value::Object(children.into_iter().map(member).collect::<Map<_, _>>())
}

/// Code and message of a failure, in either protocol.
fn problem(answer: &Value) -> (String, Option<String>) {
    let error = [&answer["Errors"]["Error"], &answer["Error"]];
    let error = error.into_iter().find(|error| error.is_object());
    let error = error.unwrap_or(answer);
    let text = |name: &str| error[name].as_str().map(str::to_owned);
    let code = text("Code").or_else(|| text("__type"));
    let code = code.unwrap_or_else(|| "NoCode".to_owned());
    let code = code.rsplit('#').next().unwrap_or_default().to_owned();
    (code, text("message").or_else(|| text("Message")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_become_numbered_fields() {
        let input = json!({"VpcId": "vpc-1", "Filter": [{"Name": "a", "Value": ["x", "y"]}]});
        let mut seen = Vec::new();
        fields("", &input, &mut |name, value| {
            seen.push(format!("{name}={value}"));
        });
        seen.sort();
        assert_eq!(
            seen,
            [
                "Filter.1.Name=a",
                "Filter.1.Value.1=x",
                "Filter.1.Value.2=y",
                "VpcId=vpc-1"
            ]
        );
    }

    #[test]
    fn answers_and_failures_are_read_in_both_protocols() {
        let ec2 = from_xml(
            "<DescribeSubnetsResponse xmlns=\"http://ec2/\"><requestId>1</requestId><subnetSet>\
             <item><subnetId>subnet-1</subnetId><tagSet/></item></subnetSet></DescribeSubnetsResponse>",
        );
        assert_eq!(
            ec2.unwrap()["subnetSet"],
            json!([{"subnetId": "subnet-1", "tagSet": ""}])
        );
        let stacks = from_xml(
            "<DescribeStacksResponse><DescribeStacksResult><Stacks><member><StackStatus>X</StackStatus>\
             </member></Stacks></DescribeStacksResult><ResponseMetadata/></DescribeStacksResponse>",
        );
        assert_eq!(stacks.unwrap()["Stacks"][0]["StackStatus"], "X");
        let refused = "<Response><Errors><Error><Code>UnauthorizedOperation</Code>\
                       <Message>no</Message></Error></Errors></Response>";
        let expected = |code: &str| (code.to_owned(), Some("no".to_owned()));
        assert_eq!(
            problem(&from_xml(refused).unwrap()),
            expected("UnauthorizedOperation")
        );
        let denied = json!({"__type": "com.amazonaws#AccessDeniedException", "message": "no"});
        assert_eq!(problem(&denied), expected("AccessDeniedException"));
        assert_eq!(problem(&Value::Null), ("NoCode".to_owned(), None));
    }
}
