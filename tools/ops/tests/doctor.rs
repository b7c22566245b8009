//! The doctor against an emulated AWS, with fake answers for what that does
//! not emulate: the real program.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Emulator, json, text};
use serde_json::{Value, json};

const MANIFEST: &str = include_str!("manifest.json");

/// AWS beside the emulator: it answers for service quotas and for what the
/// emulator's EC2 lacks, and hands the rest on.
struct Besides {
    emulator: u16,
    vcpus: AtomicU32,
}

impl Besides {
    fn serve(self: &Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let besides = Arc::clone(self);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                besides.answer(stream);
            }
        });
        endpoint
    }

    fn answer(&self, mut stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
        let mut headers = BTreeMap::new();
        let mut line = String::new();
        while reader.read_line(&mut line).is_ok_and(|length| length > 2) {
            if let Some((name, value)) = line.split_once(':') {
                headers.insert(name.to_lowercase(), value.trim().to_owned());
            }
            line.clear();
        }
        let length = headers.get("content-length").map_or("0", String::as_str);
        let mut body = vec![0; length.parse().expect("a length")];
        reader.read_exact(&mut body).expect("a body");
        let asked = String::from_utf8_lossy(&body).into_owned();
        assert!(
            headers["authorization"].contains("Signature="),
            "{headers:?}"
        );
        let mut status = "200 OK";
        let answer = if headers
            .get("x-amz-target")
            .is_some_and(|name| name.ends_with("GetServiceQuota"))
        {
            let is_spot = asked.contains("L-3819A6DF");
            assert!(is_spot || asked.contains("L-DB2E81BA"), "{asked}");
            let vcpus = if is_spot {
                0
            } else {
                self.vcpus.load(Ordering::SeqCst)
            };
            json!({"Quota": {"Value": f64::from(vcpus)}})
                .to_string()
                .into_bytes()
        } else if asked.contains("Action=DescribeInstanceTypeOfferings") {
            b"<R><instanceTypeOfferingSet><item><location>eu-west-1b</location></item>\
              </instanceTypeOfferingSet></R>"
                .to_vec()
        } else if asked.contains("Action=DescribeInstanceTypes") {
            b"<R><instanceTypeSet><item><vCpuInfo><defaultVCpus>4</defaultVCpus></vCpuInfo>\
              <processorInfo><supportedArchitectures><item>x86_64</item></supportedArchitectures>\
              </processorInfo><gpuInfo><gpus><item><manufacturer>NVIDIA</manufacturer></item></gpus>\
              </gpuInfo></item></instanceTypeSet></R>"
                .to_vec()
        } else if asked.contains("Action=GetEbsDefaultKmsKeyId") {
            b"<R><kmsKeyId>alias/aws/ebs</kmsKeyId></R>".to_vec()
        } else {
            let kept = ["authorization", "content-type"].map(|name| (name, headers[name].as_str()));
            let answer = ministack::request(self.emulator, "POST", "/", &kept, &body);
            // As it is answered for a VPC that does not exist.
            answer.unwrap_or_else(|_| {
                status = "400 Bad Request";
                b"<Response><Errors><Error><Code>InvalidVpcID.NotFound</Code></Error></Errors></Response>"
                    .to_vec()
            })
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            answer.len()
        );
        stream
            .write_all(&[head.as_bytes(), &answer].concat())
            .expect("a reader");
    }
}

/// What the emulator is asked to make.
fn make(emulator: &Emulator, service: &str, target: &str, body: &str) -> String {
    let scope = format!("Credential=test/20260101/eu-west-1/{service}/aws4_request");
    let authorization = format!("AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0");
    let kind = match target {
        "" => "application/x-www-form-urlencoded",
        _ => "application/x-amz-json-1.1",
    };
    let headers = [
        ("authorization", authorization.as_str()),
        ("content-type", kind),
        ("x-amz-target", target),
    ];
    let answer = emulator.post(
        &headers[..if target.is_empty() { 2 } else { 3 }],
        body.as_bytes(),
    );
    String::from_utf8(answer).expect("text")
}

fn ec2(emulator: &Emulator, query: &str, wanted: &str) -> String {
    let answer = make(
        emulator,
        "ec2",
        "",
        &format!("Version=2016-11-15&Action={query}"),
    );
    let value = answer
        .split_once(&format!("<{wanted}>"))
        .and_then(|(_, rest)| rest.split_once('<'));
    value
        .unwrap_or_else(|| panic!("no {wanted} in {answer}"))
        .0
        .to_owned()
}

/// A VPC with a subnet in eu-west-1b whose way out is a NAT gateway.
fn network(emulator: &Emulator) -> (String, String, String) {
    let ec2 = |query: &str, wanted: &str| ec2(emulator, query, wanted);
    let vpc = ec2("CreateVpc&CidrBlock=10.0.0.0/16", "vpcId");
    ec2(
        &format!("ModifyVpcAttribute&VpcId={vpc}&EnableDnsHostnames.Value=true"),
        "return",
    );
    let subnet = |cidr: &str| {
        let zone = "AvailabilityZone=eu-west-1b";
        ec2(
            &format!("CreateSubnet&VpcId={vpc}&CidrBlock={cidr}&{zone}"),
            "subnetId",
        )
    };
    let (inner, outer) = (subnet("10.0.0.0/24"), subnet("10.0.1.0/24"));
    let nat = ec2(
        &format!("CreateNatGateway&SubnetId={outer}&AllocationId=eipalloc-1"),
        "natGatewayId",
    );
    let table = ec2(&format!("CreateRouteTable&VpcId={vpc}"), "routeTableId");
    let route = format!(
        "CreateRoute&RouteTableId={table}&DestinationCidrBlock=0.0.0.0/0&NatGatewayId={nat}"
    );
    ec2(&route, "return");
    ec2(
        &format!("AssociateRouteTable&RouteTableId={table}&SubnetId={inner}"),
        "associationId",
    );
    let s3 = "ServiceName=com.amazonaws.eu-west-1.s3&VpcEndpointType=Gateway";
    ec2(
        &format!("CreateVpcEndpoint&VpcId={vpc}&{s3}&RouteTableId.1={table}"),
        "vpcEndpointId",
    );
    (vpc, inner, outer)
}

/// Verdict and words of the check that begins so.
fn found<'a>(report: &'a Value, check: &str) -> (&'a str, &'a str) {
    let findings = report["findings"].as_array().expect("findings");
    let named = |finding: &&Value| {
        finding["check"]
            .as_str()
            .is_some_and(|name| name.starts_with(check))
    };
    let finding = findings.iter().find(named);
    let finding = finding.unwrap_or_else(|| panic!("no {check} in {report:#}"));
    (
        finding["verdict"].as_str().expect("a verdict"),
        finding["says"].as_str().expect("words"),
    )
}

#[tokio::test]
async fn the_doctor_against_an_emulated_aws() {
    let emulator = Emulator::start(|buckets| {
        let model = buckets.join("models/clip-models/ViT-B-32");
        std::fs::create_dir_all(&model).expect("a folder");
        std::fs::write(model.join("manifest.json"), MANIFEST).expect("a file");
        for bucket in ["photos", "silent"] {
            std::fs::create_dir(buckets.join(bucket)).expect("a folder");
            std::fs::write(buckets.join(bucket).join("a.png"), bucket).expect("a file");
        }
        for name in ["labels.safetensors", "vision.onnx", "vision.onnx.data"] {
            std::fs::write(model.join(name), name).expect("a file");
        }
    });
    let besides = Arc::new(Besides {
        emulator: emulator.port(),
        vcpus: AtomicU32::new(40),
    });
    let endpoint = besides.serve();
    let (vpc, subnet, outer) = network(&emulator);
    let s3 = platform::s3_client(&emulator.sdk());
    let events = aws_sdk_s3::types::EventBridgeConfiguration::builder().build();
    let events =
        aws_sdk_s3::types::NotificationConfiguration::builder().event_bridge_configuration(events);
    let put = s3.put_bucket_notification_configuration().bucket("photos");
    put.notification_configuration(events.build())
        .send()
        .await
        .expect("notifications");
    let ecr = |action: &str, body: Value| {
        let target = format!("AmazonEC2ContainerRegistry_V20150921.{action}");
        make(&emulator, "ecr", &target, &body.to_string())
    };
    ecr(
        "CreateRepository",
        json!({"repositoryName": "clip-image-processor"}),
    );
    ecr(
        "PutImage",
        json!({"repositoryName": "clip-image-processor", "imageManifest": "{}", "imageTag": "latest"}),
    );

    let ask = |more: &[&str]| {
        let own = [format!("VpcId={vpc}"), format!("PrivateSubnet1={subnet}")];
        let buckets = ["doctor", "SourceBucket1=photos", "ModelBucket=models"];
        let mut command = emulator.clip_ops(&buckets);
        command
            .env("AWS_ENDPOINT_URL_EC2", &endpoint)
            .env("AWS_ENDPOINT_URL_SERVICE_QUOTAS", &endpoint)
            .args(own)
            .args(more);
        command
    };
    let run = |more: &[&str]| ask(more).output().expect("the program runs");

    // Everything is in place.
    let good = run(&["--json", "--read-model"]);
    let report = json(&good);
    for check in [
        "type g4dn.xlarge",
        "quota On-Demand",
        "quota Spot",
        "subnets",
        "zones of g4dn.2xlarge",
        "DNS",
        "way out",
        "S3 from",
        "Lambda",
        "bucket photos",
        "bucket models",
        "default key",
        "image",
        "model",
    ] {
        assert_eq!(
            found(&report, check).0,
            "pass",
            "{check} in {}",
            text(&good)
        );
    }
    assert!(
        found(&report, "model").1.ends_with("digests right"),
        "{report:#}"
    );
    assert!(good.status.success(), "{}", text(&good));
    let table = text(&run(&[]));
    assert!(
        table.contains("bucket photos (images)") && table.contains(" 0 failed"),
        "{table}"
    );

    // Each mistake is found, and is the exit status.
    let policy = json!({"Statement": [{"Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::1:root"}, "Action": "kms:*"}]});
    let key = make(
        &emulator,
        "kms",
        "TrentService.CreateKey",
        &json!({"Policy": policy.to_string()}).to_string(),
    );
    let key: Value = serde_json::from_str(&key).expect("JSON");
    let key = format!(
        "KmsKeyArn={}",
        key["KeyMetadata"]["Arn"].as_str().expect("an ARN")
    );
    let second = format!("PrivateSubnet2={outer}");
    for (mistake, check, words) in [
        ("SourceBucket1=silent", "bucket silent", "sends no events"),
        ("SourceBucket2=absent", "bucket absent", "no such bucket"),
        ("ModelPrefix=elsewhere", "model", "no manifest.json"),
        ("ModelName=ViT-L/14", "model", "ModelName is ViT-L/14"),
        ("ImageReference=:v2", "image", "no clip-image-processor:v2"),
        ("Purchase1=spot", "quota Spot", "0 vCPUs"),
        (&second, "subnets", "lie in eu-west-1b alone"),
        (&second, "way out of", ""),
        ("VpcId=vpc-0", "subnets", "not vpc-0"),
        (&key, "KmsKeyArn", "logs.eu-west-1.amazonaws.com"),
    ] {
        let bad = run(&["--json", mistake]);
        let report = json(&bad);
        if words.is_empty() {
            let last = report["findings"]
                .as_array()
                .expect("findings")
                .iter()
                .rev();
            let outer = format!("way out of {outer}");
            let mut of_outer = last.filter(|finding| finding["check"] == outer.as_str());
            assert_eq!(
                of_outer.next().expect("the second subnet")["verdict"],
                "fail"
            );
        } else {
            let (verdict, says) = found(&report, check);
            assert!(
                verdict == "fail" && says.contains(words),
                "{mistake}: {report:#}"
            );
        }
        assert_eq!(bad.status.code(), Some(1), "{mistake}");
    }
    besides.vcpus.store(0, Ordering::SeqCst);
    let bad = run(&["--json"]);
    assert_eq!(
        found(&json(&bad), "quota On-Demand").0,
        "fail",
        "{}",
        text(&bad)
    );
    besides.vcpus.store(40, Ordering::SeqCst);

    // What cannot be asked is not known, and no failure.
    let mut alone = ask(&["--json"]);
    let alone = alone.env("AWS_ENDPOINT_URL_SERVICE_QUOTAS", "http://127.0.0.1:1");
    let alone = alone.output().expect("the program runs");
    assert_eq!(found(&json(&alone), "quota On-Demand").0, "cannot-tell");
    assert!(alone.status.success(), "{}", text(&alone));
    let slip = run(&["VpcID=vpc-0"]);
    assert!(
        !slip.status.success() && text(&slip).contains("no parameter VpcID"),
        "{}",
        text(&slip)
    );

    // After the deployment the stack says its parameters, and is looked at itself.
    let queue = json!({"Parameters": {
        "VpcId": {"Type": "String", "Default": vpc}, "PrivateSubnet1": {"Type": "String", "Default": subnet},
        "SourceBucket1": {"Type": "String", "Default": "silent"}, "ModelBucket": {"Type": "String", "Default": "models"},
    }, "Resources": {"InputQueue": {"Type": "AWS::SQS::Queue"}}});
    let form = [
        ("Action", "CreateStack"),
        ("StackName", "deployed"),
        ("TemplateBody", &queue.to_string()),
    ];
    let form = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(form)
        .finish();
    make(&emulator, "cloudformation", "", &form);
    let deployed = || {
        let mut command = emulator.clip_ops(&["doctor", "--stack", "deployed", "--json"]);
        json(&command.output().expect("the program runs"))
    };
    let mut report = deployed();
    for _ in 0..50 {
        if found(&report, "stack deployed").0 != "cannot-tell" {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        report = deployed();
    }
    assert_eq!(
        found(&report, "stack deployed"),
        ("pass", "CREATE_COMPLETE")
    );
    assert_eq!(
        found(&report, "resources"),
        ("pass", "1 are as they should be")
    );
    assert_eq!(found(&report, "bucket silent").0, "fail");
    assert_eq!(found(&report, "alarms").0, "pass", "{report:#}");
}
