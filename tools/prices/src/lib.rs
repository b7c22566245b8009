//! AWS's list prices, each with its source and date: `infra/prices.json`. What
//! estimates and simulates reads them here; what is deployed takes them as
//! parameters.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Price {
    pub usd: f64,
    pub per: String,
    pub source: String,
    pub date: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Prices {
    pub region: String,
    pub prices: BTreeMap<String, Price>,
}

static PRICES: LazyLock<Prices> = LazyLock::new(|| {
    let text = include_str!("../../../infra/prices.json");
    serde_json::from_str(text).unwrap_or_else(|error| panic!("infra/prices.json: {error}"))
});

pub fn all() -> &'static Prices {
    &PRICES
}

/// Dollars by name; `None` for one that nobody wrote down.
pub fn find(name: &str) -> Option<f64> {
    Some(PRICES.prices.get(name)?.usd)
}

/// Dollars of a price that the file always has.
///
/// # Panics
///
/// If it has not: the file is part of the program.
pub fn usd(name: &str) -> f64 {
    find(name).unwrap_or_else(|| panic!("infra/prices.json has no {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_price_has_a_source_and_a_date() {
        for (name, price) in &all().prices {
            assert!(price.usd > 0.0 && !price.source.is_empty(), "{name}");
            assert!(
                price.date.starts_with("20") && !price.per.is_empty(),
                "{name}"
            );
        }
        assert_eq!(find("instanceHour.x9"), None);
    }

    #[test]
    fn the_template_s_default_prices_are_these() {
        let text = include_str!("../../../infra/template.yaml");
        let template = template::Template::parse(text).expect("it can be read");
        for (parameter, name) in [
            ("ExpressPricePerGbSecond", "lambdaGbSecond"),
            ("ExpressPricePerRequest", "lambdaRequest"),
            ("InstancePricePerHour", "instanceHour.g4dn.xlarge"),
            ("InstancePricePerHour2", "instanceHour.g4dn.2xlarge"),
            ("InstancePricePerHour3", "instanceHour.g5.xlarge"),
        ] {
            let default = template.part(&format!("/Parameters/{parameter}/Default"));
            assert_eq!(template::number(default), find(name), "{parameter}");
        }
    }
}
