//! Messages as a table for a person.

use crate::table::{aligned, one_line};
use crate::units;

use super::Fields;

/// Characters of an object's URL that are shown: the end tells it apart.
const OBJECT_WIDTH: usize = 60;

const HEADER: [&str; 7] = ["ID", "AGE", "RECEIVED", "BY", "STAGE", "OBJECT", "REASON"];

pub fn row(fields: &Fields) -> [String; 7] {
    let optional = |value: Option<&String>| value.cloned().unwrap_or_else(|| "-".to_owned());
    let mut reason = one_line(&fields.reason);
    if let Some(original) = fields.original_bytes {
        reason.push_str(&format!(
            " (body cut from {} bytes, cannot be sent back)",
            units::count(original)
        ));
    }
    if fields.is_empty_record {
        reason.push_str(" (a record without its payload, cannot be sent back)");
    }
    [
        fields.id.clone(),
        fields.age_seconds.map_or("-".to_owned(), units::age),
        fields
            .receive_count
            .map_or("-".to_owned(), |count| count.to_string()),
        one_line(&fields.by),
        one_line(&optional(fields.stage.as_ref())),
        end_of(&one_line(&optional(fields.object.as_ref()))),
        reason,
    ]
}

pub fn table(messages: &[Fields]) -> String {
    let mut rows = vec![HEADER.map(str::to_owned)];
    rows.extend(messages.iter().map(row));
    aligned(&rows)
}

fn end_of(text: &str) -> String {
    let length = text.chars().count();
    if length <= OBJECT_WIDTH {
        return text.to_owned();
    }
    let end: String = text.chars().skip(length - OBJECT_WIDTH + 1).collect();
    format!("…{end}")
}

#[cfg(test)]
mod tests {
    use super::super::letter::tests::letter;
    use super::*;

    #[test]
    fn the_columns_are_aligned_and_the_reason_is_whole() {
        let long = format!("s3://bucket/{}/end.png", "deep/".repeat(30));
        let messages = [
            letter(
                "0f6c",
                &[
                    ("RejectionReason", "not a\nPNG\u{1b}[2J"),
                    ("RejectedObject", &long),
                ],
            )
            .fields,
            letter(
                "81aa-long",
                &[("RejectionReason", "é"), ("OriginalBytes", "300000")],
            )
            .fields,
        ];
        let text = table(&messages);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let column = |line: &str, word: &str| line.find(word).map(|at| line[..at].chars().count());
        let reason_at = column(lines[0], "REASON");
        assert_eq!(column(lines[1], "not a PNG"), reason_at, "{text}");
        assert_eq!(
            column(lines[2], "é (body cut from 300,000"),
            reason_at,
            "{text}"
        );
        assert!(
            lines[1].contains("…") && lines[1].contains("/end.png") && lines[1].contains("30m")
        );
        assert!(!text.contains('\u{1b}'));
    }
}
