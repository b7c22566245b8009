//! What became of the objects of a walk.

use serde::{Deserialize, Serialize};

use crate::units;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    NoImageByName,
    OtherType,
    TooSmall,
    TooLarge,
    /// It was last modified before the time asked for.
    TooOld,
    /// It was last modified after the time asked for.
    TooNew,
    /// It lies in an archive and must be restored first.
    Archived,
    /// It is an old version or a delete marker of an inventory.
    NotCurrent,
    /// It has its vector for this model.
    AlreadyEmbedded,
}

/// Objects by what became of them. Each listed object is in exactly one of
/// the others (`sent_again` is a part of `enqueued`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    pub listed: u64,
    pub no_image_by_name: u64,
    pub other_type: u64,
    pub too_small: u64,
    pub too_large: u64,
    pub too_old: u64,
    pub too_new: u64,
    pub archived: u64,
    pub not_current: u64,
    pub already_embedded: u64,
    pub enqueued: u64,
    /// Bytes of those.
    pub enqueued_bytes: u64,
    /// Of the enqueued ones, those that may be in the queue twice, because an
    /// earlier run ended before it knew.
    pub sent_again: u64,
    /// Objects whose event the queue will never take.
    pub refused: u64,
}

impl Counts {
    pub fn skip(&mut self, skip: Skip) {
        *match skip {
            Skip::NoImageByName => &mut self.no_image_by_name,
            Skip::OtherType => &mut self.other_type,
            Skip::TooSmall => &mut self.too_small,
            Skip::TooLarge => &mut self.too_large,
            Skip::TooOld => &mut self.too_old,
            Skip::TooNew => &mut self.too_new,
            Skip::Archived => &mut self.archived,
            Skip::NotCurrent => &mut self.not_current,
            Skip::AlreadyEmbedded => &mut self.already_embedded,
        } += 1;
    }

    pub fn filtered(&self) -> u64 {
        self.no_image_by_name
            + self.other_type
            + self.too_small
            + self.too_large
            + self.too_old
            + self.too_new
            + self.archived
            + self.not_current
    }

    /// Objects of which it is decided and done what becomes of them.
    #[cfg(test)]
    pub fn settled(&self) -> u64 {
        self.filtered() + self.already_embedded + self.enqueued + self.refused
    }

    pub fn line(&self) -> String {
        format!(
            "{} listed · {} filtered out · {} already embedded · {} enqueued",
            units::count(self.listed),
            units::count(self.filtered()),
            units::count(self.already_embedded),
            units::count(self.enqueued),
        )
    }

    /// A table for a person; what did not occur is left out.
    pub fn table(&self, is_dry_run: bool) -> String {
        let (enqueued, verb) = if is_dry_run {
            ("would be enqueued", "would be")
        } else {
            ("enqueued", "were")
        };
        let rows = [
            (self.listed, "listed"),
            (self.enqueued, enqueued),
            (
                self.sent_again,
                "  of them perhaps sent twice (same event id)",
            ),
            (self.already_embedded, "already embedded"),
            (self.refused, "refused by the queue"),
            (self.no_image_by_name, "not an image by name"),
            (self.other_type, "of another type"),
            (self.too_small, "too small"),
            (self.too_large, "too large"),
            (self.too_old, "too old"),
            (self.too_new, "too new"),
            (
                self.archived,
                "archived (restore them, then --include-archived)",
            ),
            (self.not_current, "old versions or delete markers"),
        ];
        let mut table = String::new();
        for (position, (number, what)) in rows.into_iter().enumerate() {
            let is_always_shown = position < 2;
            if number > 0 || is_always_shown {
                table.push_str(&format!("{:>14}  {what}\n", units::count(number)));
            }
        }
        table.push_str(&format!(
            "{:>14}  in the objects that {verb} enqueued\n",
            units::bytes(self.enqueued_bytes)
        ));
        table
    }
}
