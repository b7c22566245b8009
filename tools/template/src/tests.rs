use serde_json::json;

use super::*;

struct Deployed;

impl Surroundings for Deployed {
    fn reference(&self, logical_id: &str, _: &str) -> Option<String> {
        Some(format!("stack-{logical_id}"))
    }
    fn attribute(&self, logical_id: &str, _: &str, attribute: &str) -> Option<String> {
        Some(format!("{logical_id}@{attribute}"))
    }
    fn pseudo(&self, name: &str) -> Option<String> {
        (name == "Region").then(|| "us-east-1".to_owned())
    }
}

fn given(parameters: &[(&str, &str)]) -> Parameters {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    parameters.iter().map(owned).collect()
}

fn resolve(text: &str, parameters: &[(&str, &str)]) -> Result<Stack, TemplateError> {
    Template::parse(text)?.resolve(&given(parameters), &Deployed)
}

fn before_deployment(text: &str, parameters: &[(&str, &str)]) -> Result<Stack, TemplateError> {
    Template::parse(text)?.resolve(&given(parameters), &NotDeployed)
}

const TEMPLATE: &str = r#"
Parameters:
  Days: { Type: Number, Default: 14, MinValue: 1, MaxValue: 14 }
  Kind: { Type: String, Default: topic, AllowedValues: [topic, queue, both] }
  Bucket: { Type: String }
Mappings:
  Retention: { "14": { Seconds: 1209600 }, "1": { Seconds: 86400 } }
Conditions:
  IsBoth: !Equals [!Ref Kind, both]
  HasQueue: !Or [!Equals [!Ref Kind, queue], !Condition IsBoth]
  HasNone: !Not [!Condition HasQueue]
Globals:
  Function: { Timeout: 3, Environment: { Variables: { A: global, B: global } } }
Resources:
  Queue:
    Type: AWS::SQS::Queue
    Properties:
      Retention: !FindInMap [Retention, !Ref Days, Seconds]
      Redrive: { target: !GetAtt Dead.Arn, count: 5 }
      Gone: !If [HasQueue, yes-please, !Ref AWS::NoValue]
      List: [a, !If [HasQueue, b, !Ref "AWS::NoValue"], c]
      Text: !Sub "${Queue.Arn}/${AWS::Region}/${Bucket}/${!literal}"
      Own: !Sub ["${One}-${Bucket}", { One: !Join ["+", [x, !Ref Days]] }]
      Part: !Select [1, !Split ["/", !Sub "${Bucket}/${Days}"]]
      Statement: { Condition: { Bool: { aws:SecureTransport: "false" } } }
      Account: 000000000000
      Date: 2012-10-17
      Quoted: "14"
  Dead: { Type: AWS::SQS::Queue, Condition: HasNone }
  Function:
    Type: AWS::Serverless::Function
    Properties: { Environment: { Variables: { B: own } } }
"#;

#[test]
fn functions_are_carried_out() {
    let stack = resolve(TEMPLATE, &[("Bucket", "photos")]).expect("resolved");
    assert_eq!(
        stack.properties("Queue"),
        &json!({
            "Retention": 1_209_600,
            "Redrive": {"target": "Dead@Arn", "count": 5},
            "List": ["a", "c"],
            "Text": "Queue@Arn/us-east-1/photos/${literal}",
            "Own": "x+14-photos",
            "Part": "14",
            "Statement": {"Condition": {"Bool": {"aws:SecureTransport": "false"}}},
            "Account": "000000000000",
            "Date": "2012-10-17",
            "Quoted": "14",
        })
    );
    assert!(stack.resources.contains_key("Dead"));
}

#[test]
fn before_a_deployment_what_stands_on_resources_stays() {
    let stack = before_deployment(TEMPLATE, &[("Bucket", "photos")]).expect("resolved");
    let queue = stack.properties("Queue");
    assert_eq!(
        queue["Redrive"]["target"],
        json!({"Fn::GetAtt": ["Dead", "Arn"]})
    );
    assert_eq!(
        queue["Text"],
        json!({"Fn::Sub": "${Queue.Arn}/${AWS::Region}/photos/${!literal}"})
    );
    assert_eq!(queue["Own"], "x+14-photos");
    assert_eq!(queue["Retention"], 1_209_600);
    assert_eq!(referred(&queue["Redrive"]["target"]), Some("Dead"));
    assert_eq!(referred(&json!({"Fn::Sub": "${Dead.Arn}"})), Some("Dead"));

    let nested = r#"Resources: { A: { Type: T, Properties: {
        Arn: !Sub ["${X}/*", { X: !GetAtt A.Arn }],
        Data: !Base64 { "Fn::Sub": "${A}" },
        Cut: !Sub ["${X}", { X: !Select [0, !Split ["/", !Ref A]] }] } } }"#;
    let stack = before_deployment(nested, &[]).expect("resolved");
    assert_eq!(
        stack.properties("A"),
        &json!({
            "Arn": {"Fn::Sub": "${A.Arn}/*"},
            "Data": {"Fn::Base64": {"Fn::Sub": "${A}"}},
            "Cut": {"Fn::Sub": ["${X}", {"X": {"Fn::Select": [0, {"Fn::Split": ["/", {"Ref": "A"}]}]}}]},
        })
    );
}

#[test]
fn conditions_choose() {
    let stack = resolve(TEMPLATE, &[("Bucket", "photos"), ("Kind", "both")]).expect("resolved");
    let queue = stack.properties("Queue");
    assert_eq!(queue["Gone"], "yes-please");
    assert_eq!(queue["List"], json!(["a", "b", "c"]));
    assert!(!stack.resources.contains_key("Dead"));
    assert_eq!(stack.properties("Dead"), &Value::Null);
}

#[test]
fn conditions_in_a_circle_are_refused() {
    let text = "Conditions: { A: !Not [!Condition B], B: !Condition A }
Resources: { Q: { Type: T, Condition: A } }";
    assert!(matches!(
        resolve(text, &[]),
        Err(TemplateError::UnknownReference { .. })
    ));
}

#[test]
fn globals_lie_under_a_functions_own_properties() {
    let stack = resolve(TEMPLATE, &[("Bucket", "photos")]).expect("resolved");
    let function = stack.properties("Function");
    assert_eq!(function["Timeout"], 3);
    assert_eq!(
        function["Environment"]["Variables"],
        json!({"A": "global", "B": "own"})
    );
}

#[test]
fn parameters_are_checked() {
    assert_eq!(
        resolve(TEMPLATE, &[]).unwrap_err(),
        TemplateError::MissingParameter("Bucket".into())
    );
    let unknown = resolve(TEMPLATE, &[("Bucket", "b"), ("Other", "x")]).unwrap_err();
    assert_eq!(unknown, TemplateError::UnknownParameter("Other".into()));
    for (name, value, accepted) in [
        ("Kind", "none", "one of topic, queue, both is accepted"),
        ("Days", "15", "at most 14 is accepted"),
        ("Days", "0", "at least 1 is accepted"),
        ("Days", "soon", "a number is accepted"),
    ] {
        let error = resolve(TEMPLATE, &[("Bucket", "b"), (name, value)])
            .unwrap_err()
            .to_string();
        assert!(error.contains(accepted), "{error}");
    }
}

#[test]
fn a_reference_to_nothing_says_where() {
    let text = "Resources: { Queue: { Type: T, Properties: { A: { B: !Ref Nothing } } } }";
    let error = resolve(text, &[]).unwrap_err().to_string();
    assert_eq!(
        error,
        "Queue.A.B: Nothing is neither a parameter nor a resource"
    );
    assert!(matches!(resolve("a: [", &[]), Err(TemplateError::Yaml(_))));
    assert_eq!(
        resolve("a: 1", &[]).unwrap_err(),
        TemplateError::NoResources
    );
}

#[test]
fn aliases_and_repeated_keys_are_refused() {
    let repeated = Template::parse("Resources: {}\nOutputs: { A: 1, A: 2 }\n").unwrap_err();
    assert!(
        repeated.to_string().contains("line 2: A is there twice"),
        "{repeated}"
    );
    assert!(Template::parse("Resources: &x {}\nOther: *x\n").is_err());
}

/// The forms in which a CDK synthesises its templates.
#[test]
fn a_synthesised_template_is_read_by_the_same_rules() {
    let text = r#"{
      "Parameters": {"BootstrapVersion": {
        "Type": "AWS::SSM::Parameter::Value<String>", "Default": "/cdk-bootstrap/version"}},
      "Conditions": {"CDKMetadataAvailable": {"Fn::Or": [
        {"Fn::Equals": [{"Ref": "AWS::Region"}, "af-south-1"]},
        {"Fn::Equals": [{"Ref": "AWS::Region"}, "us-east-1"]}]}},
      "Resources": {
        "InputQueue8A1B": {"Type": "AWS::SQS::Queue", "Properties": {
          "RedrivePolicy": {"deadLetterTargetArn": {"Fn::GetAtt": ["Dead3C2D", "Arn"]}, "maxReceiveCount": 5},
          "VisibilityTimeout": 300}, "UpdateReplacePolicy": "Delete"},
        "Dead3C2D": {"Type": "AWS::SQS::Queue"},
        "Bucket": {"Type": "AWS::S3::Bucket", "Condition": "CDKMetadataAvailable", "Properties": {
          "BucketName": {"Fn::Join": ["", ["cache-", {"Ref": "AWS::Region"}, "-",
            {"Fn::Select": [4, {"Fn::Split": [":", {"Fn::GetAtt": ["InputQueue8A1B", "Arn"]}]}]}]]}}}
      }
    }"#;
    struct Arns;
    impl Surroundings for Arns {
        fn attribute(&self, logical_id: &str, _: &str, _: &str) -> Option<String> {
            Some(format!("arn:aws:sqs:us-east-1:000000000000:{logical_id}"))
        }
        fn pseudo(&self, name: &str) -> Option<String> {
            (name == "Region").then(|| "us-east-1".to_owned())
        }
    }
    let template = Template::parse(text).expect("read");
    let stack = template
        .resolve(&Parameters::new(), &Arns)
        .expect("resolved");
    assert_eq!(
        stack.properties("InputQueue8A1B")["RedrivePolicy"]["deadLetterTargetArn"],
        "arn:aws:sqs:us-east-1:000000000000:Dead3C2D"
    );
    assert_eq!(
        stack.properties("Bucket")["BucketName"],
        "cache-us-east-1-000000000000"
    );
    let before = template
        .resolve(&Parameters::new(), &NotDeployed)
        .expect("resolved");
    let target = &before.properties("InputQueue8A1B")["RedrivePolicy"]["deadLetterTargetArn"];
    assert_eq!(referred(target), Some("Dead3C2D"));
}
