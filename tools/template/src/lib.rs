//! CloudFormation templates, written by hand (SAM's included) or synthesised:
//! read, and resolved for given parameters as CloudFormation would.
//!
//! What only a deployment knows comes from [`Surroundings`]; without them
//! references to resources stay as they are, and what stands on them too.

mod resolve;
mod yaml;

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use thiserror::Error;

pub use yaml::read_yaml;

pub type Parameters = BTreeMap<String, String>;

#[derive(Debug, Error, PartialEq)]
pub enum TemplateError {
    #[error("the template is not valid YAML: {0}")]
    Yaml(String),
    #[error("the template has no Resources")]
    NoResources,
    #[error("parameter {0} has no default and was not given")]
    MissingParameter(String),
    #[error("the template has no parameter {0}")]
    UnknownParameter(String),
    #[error("parameter {name} is {value:?}: {accepted}")]
    ParameterValue {
        name: String,
        value: String,
        accepted: String,
    },
    #[error("{place}: {name} is neither a parameter nor a resource")]
    UnknownReference { place: String, name: String },
    #[error("{place}: cannot resolve {function}")]
    Function { place: String, function: String },
}

/// What CloudFormation knows once the resources exist.
pub trait Surroundings {
    /// What `!Ref` gives for a resource.
    fn reference(&self, _logical_id: &str, _kind: &str) -> Option<String> {
        None
    }
    /// What `!GetAtt` gives for a resource.
    fn attribute(&self, _logical_id: &str, _kind: &str, _attribute: &str) -> Option<String> {
        None
    }
    /// `AWS::Region`, `AWS::AccountId` and so on, without `AWS::`.
    fn pseudo(&self, _name: &str) -> Option<String> {
        None
    }
}

/// Before a deployment nothing is known.
pub struct NotDeployed;

impl Surroundings for NotDeployed {}

/// A template as written, intrinsic functions in their long form.
#[derive(Debug, Clone)]
pub struct Template {
    /// The file's text, for what looks at comments and literals.
    pub text: String,
    root: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Such as `AWS::SQS::Queue`.
    pub kind: String,
    /// Its properties; what was `AWS::NoValue` is absent.
    pub properties: Value,
    pub metadata: Value,
}

/// The resources whose condition holds, for one choice of parameters.
#[derive(Debug, Clone, Default)]
pub struct Stack {
    /// By logical id.
    pub resources: BTreeMap<String, Resource>,
    /// The parameters' values, defaults included.
    pub parameters: Parameters,
}

impl Stack {
    /// Ids and properties of the resources of a type.
    pub fn of_type<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.all()
            .filter(move |(_, of, _)| *of == kind)
            .map(|(id, _, properties)| (id, properties))
    }

    /// Ids, types and properties of all resources.
    pub fn all(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        self.resources
            .iter()
            .map(|(id, resource)| (id.as_str(), resource.kind.as_str(), &resource.properties))
    }

    /// A resource's properties; null when there is none of that id.
    pub fn properties(&self, id: &str) -> &Value {
        let resource = self.resources.get(id);
        resource.map_or(&Value::Null, |resource| &resource.properties)
    }
}

impl Template {
    /// Reads a template's text.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let root = read_yaml(text)?;
        if !root["Resources"].is_object() {
            return Err(TemplateError::NoResources);
        }
        Ok(Self {
            text: text.to_owned(),
            root,
        })
    }

    /// A part of the template as it was written, by JSON pointer.
    pub fn part(&self, pointer: &str) -> &Value {
        self.root.pointer(pointer).unwrap_or(&Value::Null)
    }

    /// Resolves the template for `parameters` over their defaults.
    pub fn resolve(
        &self,
        parameters: &Parameters,
        surroundings: &dyn Surroundings,
    ) -> Result<Stack, TemplateError> {
        let parameters = self.parameters(parameters)?;
        let resolver = resolve::Resolver::new(&self.root, &parameters, surroundings);
        let globals = resolver.resolve(&self.root["Globals"]["Function"], "Globals")?;
        let mut resources = BTreeMap::new();
        for (id, resource) in members(&self.root["Resources"]) {
            if let Some(condition) = resource["Condition"].as_str()
                && !resolver.condition(condition, id)?
            {
                continue;
            }
            let kind = text_of(&resource["Type"]);
            let mut properties = resolver.resolve(&resource["Properties"], id)?;
            if kind == "AWS::Serverless::Function"
                && let (Value::Object(under), Value::Object(over)) = (&globals, &properties)
            {
                let mut merged = under.clone();
                merge(&mut merged, over);
                properties = Value::Object(merged);
            }
            let metadata = resolver.resolve(&resource["Metadata"], id)?;
            let resource = Resource {
                kind,
                properties,
                metadata,
            };
            resources.insert(id.clone(), resource);
        }
        Ok(Stack {
            resources,
            parameters,
        })
    }

    fn parameters(&self, given: &Parameters) -> Result<Parameters, TemplateError> {
        let declared = &self.root["Parameters"];
        if let Some(unknown) = given.keys().find(|name| declared.get(name).is_none()) {
            return Err(TemplateError::UnknownParameter(unknown.clone()));
        }
        let mut values = Parameters::new();
        for (name, declaration) in members(declared) {
            let value = match (given.get(name), &declaration["Default"]) {
                (Some(value), _) => value.clone(),
                (None, Value::Null) => return Err(TemplateError::MissingParameter(name.clone())),
                (None, default) => text_of(default),
            };
            if let Some(accepted) = refusal(&value, declaration) {
                return Err(TemplateError::ParameterValue {
                    name: name.clone(),
                    value,
                    accepted,
                });
            }
            values.insert(name.clone(), value);
        }
        Ok(values)
    }
}

/// What the parameter accepts, where it does not accept the value.
fn refusal(value: &str, declaration: &Value) -> Option<String> {
    let allowed: Vec<String> = list(&declaration["AllowedValues"])
        .into_iter()
        .map(text_of)
        .collect();
    if !allowed.is_empty() && !allowed.iter().any(|one| one == value) {
        return Some(format!("one of {} is accepted", allowed.join(", ")));
    }
    if declaration["Type"] != "Number" {
        return None;
    }
    let (least, most) = (&declaration["MinValue"], &declaration["MaxValue"]);
    match value.parse::<f64>() {
        Err(_) => Some("a number is accepted".to_owned()),
        Ok(number) if crate::number(least).is_some_and(|least| number < least) => {
            Some(format!("at least {least} is accepted"))
        }
        Ok(number) if crate::number(most).is_some_and(|most| number > most) => {
            Some(format!("at most {most} is accepted"))
        }
        Ok(_) => None,
    }
}

/// SAM's `Globals` lie under what a function says itself.
fn merge(under: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (name, value) in over {
        match (under.get_mut(name), value) {
            (Some(Value::Object(under)), Value::Object(over)) => merge(under, over),
            _ => {
                under.insert(name.clone(), value.clone());
            }
        }
    }
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

/// A scalar as CloudFormation hands it on: everything becomes text.
pub fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// A number that may be written as a string.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

/// A value or a list of values, as a list.
pub fn list(value: &Value) -> Vec<&Value> {
    match value {
        Value::Null => Vec::new(),
        Value::Array(items) => items.iter().collect(),
        one => vec![one],
    }
}

/// The logical id that a value refers to (`Ref`, `Fn::GetAtt`, or a
/// `Fn::Sub` that is nothing else).
pub fn referred(value: &Value) -> Option<&str> {
    if let Some(id) = value["Ref"].as_str().or(value["Fn::GetAtt"][0].as_str()) {
        return Some(id);
    }
    let inner = value["Fn::Sub"]
        .as_str()?
        .strip_prefix("${")?
        .strip_suffix('}')?;
    inner.split('.').next()
}

#[cfg(test)]
mod tests;
