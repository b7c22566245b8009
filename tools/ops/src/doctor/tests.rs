use proptest::prelude::*;

use super::rules::*;
use super::*;

fn machine(name: &str, vcpus: u32) -> Machine {
    Machine {
        name: name.to_owned(),
        vcpus,
        has_nvidia: true,
        is_x86: true,
    }
}

fn subnet(id: &str, zone: &str) -> Subnet {
    Subnet {
        id: id.to_owned(),
        vpc: "vpc-1".to_owned(),
        zone: zone.to_owned(),
        gives_public_addresses: false,
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn verdict(judgement: &Judgement) -> Verdict {
    judgement.verdict
}

proptest! {
    #[test]
    fn a_quota_fails_only_below_one_instance_and_asks_for_enough(
        quota in 0u32..200,
        sizes in proptest::collection::vec(1u32..100, 1..4),
        most in 1u32..20,
    ) {
        let machines: Vec<_> = sizes.iter().map(|vcpus| machine("g4dn.x", *vcpus)).collect();
        let (least, largest) = (*sizes.iter().min().unwrap(), *sizes.iter().max().unwrap());
        let judged = rules::quota(Purchase::Spot, quota, &machines, most);
        prop_assert_eq!(judged.verdict == Verdict::Fail, quota < least);
        prop_assert_eq!(judged.advice.is_some(), quota < most * largest);
        if let Some(advice) = judged.advice {
            let asked: u32 = advice.rsplit(' ').next().unwrap().parse().unwrap();
            prop_assert!(asked >= most * largest && advice.contains("L-3819A6DF"));
        }
    }

    #[test]
    fn a_key_is_usable_when_each_action_is_allowed_and_none_denied(
        allowed in proptest::collection::vec(any::<bool>(), 2),
        cut in 4usize..12,
        denied in any::<bool>(),
    ) {
        let user = KeyUser { kind: "Service", name: "sns.amazonaws.com".to_owned(), actions: DATA_KEY };
        let patterns: Vec<_> = DATA_KEY.iter().zip(&allowed).filter(|(_, is)| **is)
            .map(|(action, _)| format!("{}*", &action[..cut.min(action.len())])).collect();
        let mut statements = vec![json!({
            "Effect": "Allow", "Principal": {"Service": [user.name]}, "Action": patterns,
        })];
        if denied {
            statements.push(json!({"Effect": "Deny", "Principal": "*", "Action": "kms:*"}));
        }
        let judged = rules::key("Enabled", &json!({"Statement": statements}), &[user]);
        // A pattern of four characters, `kms:*`, allows both.
        let all = patterns.iter().any(|one| one == "kms:*") || allowed.iter().all(|is| *is);
        prop_assert_eq!(judged.verdict == Verdict::Pass, all && !denied);
    }

    #[test]
    fn a_subnet_with_every_endpoint_needs_no_route(missing in 0usize..ENDPOINTS.len()) {
        let mut has = set(ENDPOINTS);
        let of = |has: &Endpoints, route| {
            rules::way_out(&route, &subnet("s", "a"), has, ENDPOINTS).verdict
        };
        prop_assert_eq!(of(&has, DefaultRoute::None), Verdict::Pass);
        has.remove(ENDPOINTS[missing]);
        prop_assert_eq!(of(&has, DefaultRoute::Nat), Verdict::Pass);
        prop_assert_eq!(of(&has, DefaultRoute::Other("tgw-1".to_owned())), Verdict::CannotTell);
        let gone = DefaultRoute::Blackhole("nat-1".to_owned());
        for route in [DefaultRoute::None, DefaultRoute::InternetGateway, gone] {
            let judged = rules::way_out(&route, &subnet("s", "a"), &has, ENDPOINTS);
            prop_assert_eq!(judged.verdict, Verdict::Fail);
            prop_assert!(judged.advice.unwrap().contains(ENDPOINTS[missing]));
        }
    }
}

#[test]
fn the_quotas_are_of_g_and_vt_instances() {
    for name in ["g4dn.xlarge", "g5.xlarge", "gr6.4xlarge", "vt1.3xlarge"] {
        assert!(is_g_or_vt(name), "{name}");
    }
    for name in ["p3.2xlarge", "c7i.large", "inf2.xlarge", "4.x"] {
        assert!(!is_g_or_vt(name), "{name}");
    }
    let unused = rules::quota(Purchase::Spot, 0, &[], 5);
    assert_eq!(verdict(&unused), Verdict::Pass);
}

#[test]
fn a_machine_has_an_nvidia_gpu_and_an_x86_processor() {
    assert_eq!(
        verdict(&rules::machine(&machine("g4dn.xlarge", 4))),
        Verdict::Pass
    );
    let (arm, amd) = (machine("g5g.xlarge", 4), machine("g4ad.xlarge", 4));
    let arm = Machine {
        is_x86: false,
        ..arm
    };
    let amd = Machine {
        has_nvidia: false,
        ..amd
    };
    for machine in [arm, amd] {
        assert_eq!(verdict(&rules::machine(&machine)), Verdict::Fail);
    }
}

#[test]
fn reserving_needs_a_hundred_more_that_are_free() {
    for (limit, unreserved, reserves, is_deployed, expected) in [
        (10, 10, true, false, Verdict::Fail),
        (10, 10, false, false, Verdict::Pass),
        (1000, 100, true, false, Verdict::Fail),
        (1000, 101, true, false, Verdict::Pass),
        (1000, 100, true, true, Verdict::Pass),
    ] {
        let judged = rules::concurrency(limit, unreserved, reserves, is_deployed, 0);
        assert_eq!(judged.verdict, expected, "{limit} {unreserved} {reserves}");
    }
    for (lane, expected) in [(8, Verdict::Pass), (9, Verdict::Fail)] {
        let judged = rules::concurrency(10, 10, false, false, lane);
        assert_eq!(judged.verdict, expected, "{lane}");
    }
    assert!(rules::concurrency(10, 10, false, false, 0).advice.is_some());
}

#[test]
fn subnets_exist_in_the_vpc_and_in_zones_of_their_own() {
    let (a, b) = (subnet("s-a", "1a"), subnet("s-b", "1b"));
    let of = |asked: &[&str], found: &[Subnet]| rules::subnets("vpc-1", asked, found);
    assert_eq!(
        of(&["s-a", "s-b"], &[a.clone(), b.clone()]),
        Judgement::pass("1a, 1b")
    );
    let one = of(&["s-a"], std::slice::from_ref(&a));
    assert_eq!((one.verdict, one.advice.is_some()), (Verdict::Pass, true));
    let elsewhere = Subnet {
        vpc: "vpc-2".to_owned(),
        ..b.clone()
    };
    let same_zone = Subnet {
        zone: "1a".to_owned(),
        ..b
    };
    for found in [
        vec![a.clone()],
        vec![a.clone(), elsewhere],
        vec![a, same_zone],
    ] {
        assert_eq!(verdict(&of(&["s-a", "s-b"], &found)), Verdict::Fail);
    }
}

#[test]
fn a_type_must_be_offered_where_a_subnet_is() {
    let subnets = [subnet("s-a", "1a"), subnet("s-b", "1b")];
    let of = |zones: &[&str]| rules::offered(&set(zones), &subnets);
    assert_eq!(of(&["1a", "1b", "1c"]).advice, None);
    let part = of(&["1b", "1c"]);
    assert_eq!((part.verdict, part.advice.is_some()), (Verdict::Pass, true));
    assert!(of(&["1c"]).advice.unwrap().contains("a subnet in 1c"));
    assert_eq!(verdict(&of(&[])), Verdict::Fail);
}

#[test]
fn s3_goes_by_its_own_endpoint() {
    let of = |has, route: &DefaultRoute| rules::s3_way(has, route, "vpc-1", "r").verdict;
    for route in [DefaultRoute::None, DefaultRoute::Nat] {
        assert_eq!(of(true, &route), Verdict::Pass);
        assert_eq!(of(false, &route), Verdict::Fail);
    }
    assert_eq!(of(false, &DefaultRoute::InternetGateway), Verdict::Pass);
}

#[test]
fn a_bucket_is_there_in_the_region_and_tells_eventbridge() {
    let on = |is_on| Notifications::EventBridge { is_on };
    for (region, notifications, expected) in [
        (None, Notifications::NotNeeded, "no such bucket"),
        (Some("us-east-1"), on(true), "in us-east-1"),
        (Some("eu-west-1"), on(false), "no events"),
        (Some("eu-west-1"), on(true), "sends its events"),
        (Some("eu-west-1"), Notifications::NotNeeded, "there"),
    ] {
        let judged = rules::bucket("b", region, "eu-west-1", notifications);
        assert!(judged.says.contains(expected), "{judged:?}");
        let is_good = ["sends its events", "there"].contains(&expected);
        assert_eq!(judged.verdict == Verdict::Pass, is_good);
    }
}

#[test]
fn a_disabled_key_fails_whatever_its_policy() {
    let open = json!({"Statement": {"Effect": "Allow", "Principal": "*", "Action": "*"}});
    assert_eq!(verdict(&rules::key("Enabled", &open, &[])), Verdict::Pass);
    assert_eq!(
        verdict(&rules::key("PendingDeletion", &open, &[])),
        Verdict::Fail
    );
}

fn manifest() -> Manifest {
    serde_json::from_value(manifest_json()).expect("a manifest")
}

fn manifest_json() -> Value {
    serde_json::from_str(include_str!("../../tests/manifest.json")).expect("JSON")
}

#[test]
fn a_model_is_whole_and_the_right_one() {
    let good = manifest();
    let stored = |name: &str| {
        good.files.get(name).map(|digest| Stored {
            bytes: digest.bytes,
            sha256: None,
        })
    };
    let judge = |manifest: &Manifest| rules::model(manifest, "ViT-B/32", true, stored);
    let judged = judge(&good);
    assert_eq!(judged.verdict, Verdict::Pass, "{judged:?}");
    assert!(judged.advice.unwrap().contains("--read-model"));

    let spoil = |pointer: &str, value: Value| {
        let mut json = manifest_json();
        *json.pointer_mut(pointer).expect("the place") = value;
        serde_json::from_value::<Manifest>(json).expect("a manifest")
    };
    let seed = json!({"kind": "synthesized", "seed": 1});
    for (pointer, value, words) in [
        ("/format", json!(9), "format 9"),
        ("/model", json!("ViT-L/14"), "it is ViT-L/14"),
        ("/precision", json!("fp32"), "in fp32"),
        ("/weights", seed, "MEAN NOTHING"),
        ("/labels", Value::Null, "no labels"),
    ] {
        let judged = judge(&spoil(pointer, value));
        assert_eq!(judged.verdict, Verdict::Fail, "{pointer}");
        assert!(judged.says.contains(words), "{words} in {judged:?}");
    }
    let with = |change: fn(Stored) -> Option<Stored>| {
        rules::model(&good, "ViT-B/32", true, |name| {
            let found = stored(name)?;
            if name == "vision.onnx" {
                change(found)
            } else {
                Some(found)
            }
        })
    };
    let short = with(|found| {
        Some(Stored {
            bytes: found.bytes - 1,
            ..found
        })
    });
    let wrong = with(|found| {
        Some(Stored {
            sha256: Some("00".to_owned()),
            ..found
        })
    });
    for (judged, words) in [
        (with(|_| None), "is missing"),
        (short, "bytes"),
        (wrong, "sha256"),
    ] {
        assert!(
            judged.verdict == Verdict::Fail && judged.says.contains(words),
            "{judged:?}"
        );
    }
}

#[test]
fn a_stack_is_well_when_its_last_change_was_made() {
    for (status, expected) in [
        ("CREATE_COMPLETE", Verdict::Pass),
        ("UPDATE_COMPLETE", Verdict::Pass),
        ("UPDATE_IN_PROGRESS", Verdict::CannotTell),
        ("UPDATE_ROLLBACK_COMPLETE", Verdict::Fail),
        ("ROLLBACK_COMPLETE", Verdict::Fail),
        ("CREATE_FAILED", Verdict::Fail),
        ("DELETE_COMPLETE", Verdict::Fail),
    ] {
        assert_eq!(verdict(&rules::status(status, "")), expected, "{status}");
    }
    let quota = rules::launches(Some(("Failed", "VcpuLimitExceeded")));
    assert!(quota.verdict == Verdict::Fail && quota.says.contains("VcpuLimitExceeded"));
    assert_eq!(
        verdict(&rules::launches(Some(("Successful", "")))),
        Verdict::Pass
    );
    assert_eq!(verdict(&rules::launches(None)), Verdict::Pass);
    assert_eq!(
        verdict(&rules::function("Active", "Successful")),
        Verdict::Pass
    );
    assert_eq!(verdict(&rules::function("Active", "Failed")), Verdict::Fail);
    assert_eq!(verdict(&rules::alarms(&[])), Verdict::Pass);
    let ringing = rules::alarms(&[("Silent".to_owned(), "it has not run".to_owned())]);
    assert_eq!(ringing, Judgement::fail("Silent ring", "it has not run"));
}

#[test]
fn an_image_goes_by_its_digest() {
    assert_eq!(verdict(&rules::image("r", ":latest", None)), Verdict::Fail);
    assert!(rules::image("r", ":latest", Some(1)).advice.is_some());
    assert_eq!(
        rules::image("r", "@sha256:0", Some(739_900_000)),
        Judgement::pass("there, 739 MB")
    );
}

#[test]
fn a_subnet_has_its_own_routes_or_the_vpcs() {
    let route = |more: Value| {
        let mut route = json!({"destinationCidrBlock": "0.0.0.0/0", "state": "active"});
        route
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        route
    };
    let local = json!({"destinationCidrBlock": "10.0.0.0/16", "gatewayId": "local"});
    let table = |id: &str, association: Value, routes: Value| json!({"routeTableId": id, "vpcId": "vpc-1", "associationSet": [association], "routeSet": routes});
    let tables = json!({"routeTableSet": [
        table("main", json!({"main": "true"}), json!([local, route(json!({"gatewayId": "igw-1"}))])),
        table("nat", json!({"subnetId": "s-nat"}), json!([route(json!({"natGatewayId": "nat-1"}))])),
        table("gone", json!({"subnetId": "s-gone"}),
            json!([route(json!({"natGatewayId": "nat-2", "state": "blackhole"}))])),
        table("hub", json!({"subnetId": "s-hub"}), json!([route(json!({"transitGatewayId": "tgw-1"}))])),
        table("shut", json!({"subnetId": "s-shut"}), json!([local])),
    ]});
    for (subnet, table, expected) in [
        ("s-other", "main", DefaultRoute::InternetGateway),
        ("s-nat", "nat", DefaultRoute::Nat),
        (
            "s-gone",
            "gone",
            DefaultRoute::Blackhole("nat-2".to_owned()),
        ),
        ("s-hub", "hub", DefaultRoute::Other("tgw-1".to_owned())),
        ("s-shut", "shut", DefaultRoute::None),
    ] {
        let found = default_route(&tables, "vpc-1", subnet);
        assert_eq!(found, (table.to_owned(), expected), "{subnet}");
    }
    assert_eq!(
        default_route(&tables, "vpc-2", "s-nat").1,
        DefaultRoute::None
    );
}

#[test]
fn only_endpoints_that_answer_under_awss_names_count() {
    let endpoint = |service: &str, state: &str, private: &str| {
        json!({"vpcId": "vpc-1", "vpcEndpointType": "Interface", "state": state,
            "privateDnsEnabled": private, "serviceName": format!("com.amazonaws.r.{service}")})
    };
    let endpoints = json!({"vpcEndpointSet": [
        endpoint("sqs", "available", "true"),
        endpoint("sns", "pending", "true"),
        endpoint("ecs", "available", "false"),
        endpoint("ecr.api", "Available", "true"),
    ]});
    assert_eq!(
        interfaces(&endpoints, "vpc-1", "r"),
        set(&["ecr.api", "sqs"])
    );
}

#[test]
fn a_stacks_parameters_stand_between_the_given_and_the_defaults() {
    let deployed = json!([
        {"ParameterKey": "VpcId", "ParameterValue": "vpc-1"},
        {"ParameterKey": "PrivateSubnet1", "ParameterValue": "subnet-1"},
        {"ParameterKey": "SourceBucket1", "ParameterValue": "photos"},
        {"ParameterKey": "ModelBucket", "ParameterValue": "models"},
        {"ParameterKey": "InstanceType1", "ParameterValue": "g5.xlarge"},
        {"ParameterKey": "OfAnotherVersion", "ParameterValue": "x"},
    ]);
    let given = [("ModelBucket".to_owned(), "others".to_owned())];
    let found = parameters(&list(&deployed), &given).unwrap();
    for (name, value) in [
        ("ModelBucket", "others"),
        ("InstanceType1", "g5.xlarge"),
        ("InstanceType2", "g4dn.2xlarge"),
    ] {
        assert_eq!(found[name], value);
    }
    let missing = parameters(&[], &given).unwrap_err().to_string();
    assert!(missing.contains("has no default"), "{missing}");
    let slip = [("VpcID".to_owned(), "vpc-1".to_owned())];
    let unknown = parameters(&[], &slip).unwrap_err().to_string();
    assert!(unknown.contains("no parameter VpcID"), "{unknown}");
}
