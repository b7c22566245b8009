//! Sizes, dates and rates as a person types them.

use anyhow::{Context, bail};
use chrono::{DateTime, NaiveDate, NaiveTime, Utc};

/// The units of a size: decimal as in `kB`, binary as in `KiB`.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("", 1),
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

/// Reads `500`, `10kB`, `5 MiB`.
pub fn parse_size(text: &str) -> anyhow::Result<u64> {
    let text = text.trim();
    let digits = text
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let factor = SIZE_UNITS.iter().find(|(name, _)| *name == unit);
    let size = match (number.parse::<u64>(), factor) {
        (Ok(number), Some((_, factor))) => number.checked_mul(*factor),
        _ => None,
    };
    size.with_context(|| format!("{text:?} is no size: write 500, 10kB or 5MiB"))
}

/// Reads `2026-01-31` (midnight, UTC) or `2026-01-31T12:30:00Z`.
pub fn parse_date(text: &str) -> anyhow::Result<DateTime<Utc>> {
    let text = text.trim();
    if let Ok(day) = text.parse::<NaiveDate>() {
        return Ok(day.and_time(NaiveTime::MIN).and_utc());
    }
    let instant = DateTime::parse_from_rfc3339(text).ok().with_context(|| {
        format!("{text:?} is no date: write 2026-01-31 (midnight, UTC) or 2026-01-31T12:30:00Z")
    })?;
    Ok(instant.with_timezone(&Utc))
}

/// Reads `500`, `500/s`, `0.5/s` or `max` (no limit, which is `None` inside).
pub fn parse_rate(text: &str) -> anyhow::Result<Rate> {
    let trimmed = text.trim();
    if trimmed.eq_ignore_ascii_case("max") {
        return Ok(Rate(None));
    }
    let number = trimmed.strip_suffix("/s").unwrap_or(trimmed).trim();
    match number.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(Rate(Some(rate))),
        _ => bail!("{text:?} is no rate: write 500/s, 0.5/s, or max for no limit"),
    }
}

/// Objects per second, or no limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(pub Option<f64>);

/// `1234567` as `1,234,567`.
pub fn count(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}

/// A size for a person: `1.21 GiB`.
pub fn bytes(number: u64) -> String {
    indicatif::BinaryBytes(number).to_string()
}

/// A duration for a person, in its largest unit: `45s`, `12m`, `3h`, `9d`.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_decimal_and_binary_units_in_any_case() {
        for (text, bytes) in [
            ("0", 0),
            ("500", 500),
            ("10kB", 10_000),
            ("5 MiB", 5 << 20),
            ("1gb", 1_000_000_000),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "MiB", "5 apples", "-1", "1.5MB", "99999999999GiB"] {
            let problem = parse_size(text).unwrap_err().to_string();
            assert!(problem.contains(text.trim()), "{problem}");
        }
    }

    #[test]
    fn a_day_begins_at_midnight_utc() {
        let day = parse_date("2026-01-31").unwrap();
        assert_eq!(day.to_rfc3339(), "2026-01-31T00:00:00+00:00");
        let instant = parse_date("2026-01-31T12:30:00+02:00").unwrap();
        assert_eq!(instant.to_rfc3339(), "2026-01-31T10:30:00+00:00");
        assert!(parse_date("31.1.2026").is_err());
    }

    #[test]
    fn a_rate_is_positive_or_no_limit_at_all() {
        assert_eq!(parse_rate("500/s").unwrap(), Rate(Some(500.0)));
        assert_eq!(parse_rate("0.5").unwrap(), Rate(Some(0.5)));
        assert_eq!(parse_rate("max").unwrap(), Rate(None));
        for text in ["0", "-5/s", "fast", "inf", "NaN", "5/min"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_age_is_told_in_its_largest_unit() {
        for (seconds, text) in [(5, "5s"), (600, "10m"), (7_200, "2h"), (777_600, "9d")] {
            assert_eq!(age(seconds), text);
        }
    }
}
