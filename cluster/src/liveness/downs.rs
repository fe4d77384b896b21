//! Which declarations of nodes as down are old enough not to count any more, told in the log's own measure.
//!
//! How many were declared down within a minute must be counted alike by every member, and no two clocks agree. So each member
//! notes by its own clock, which never jumps, when it saw the entry of each declaration; the leader says in its proposal up to
//! which entry they are old, and applying it compares numbers of entries. A member that has just begun takes what it finds
//! for new: for a minute it is more careful than needed.

use std::collections::BTreeMap;

use crate::state::apply_node::BLAST_WINDOW_MS;

/// What this process has seen.
#[derive(Debug, Clone, Default)]
pub struct Downs {
    /// When the entry with this index was seen, in milliseconds of this process's clock.
    seen: BTreeMap<u64, u64>,
}

impl Downs {
    /// Notes what is there now; `revisions` are the entries that declared nodes down last.
    pub fn look(&mut self, now_ms: u64, revisions: impl Iterator<Item = u64>) {
        let before = std::mem::take(&mut self.seen);
        self.seen = revisions
            .filter(|revision| *revision > 0)
            .map(|revision| (revision, before.get(&revision).copied().unwrap_or(now_ms)))
            .collect();
    }

    /// Up to this entry declarations do not count any more; 0: all do.
    pub fn settled(&self, now_ms: u64) -> u64 {
        let old = |seen_ms: u64| now_ms.saturating_sub(seen_ms) >= BLAST_WINDOW_MS;
        // Older entries were seen no later.
        self.seen.iter().rev().find(|(_, seen_ms)| old(**seen_ms)).map_or(0, |(revision, _)| *revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_old_a_minute_after_it_was_seen_and_a_new_process_sees_all_as_new() {
        let mut downs = Downs::default();
        assert_eq!(downs.settled(0), 0);
        downs.look(1_000, [0, 7].into_iter());
        downs.look(31_000, [7, 9].into_iter());
        assert_eq!(downs.settled(60_999), 0);
        assert_eq!(downs.settled(61_000), 7);
        assert_eq!(downs.settled(91_000), 9);
        downs.look(91_000, [9].into_iter());
        assert_eq!(downs.settled(91_000), 9, "the node of entry 7 is gone, or was declared down again");
        let mut new = Downs::default();
        new.look(91_000, [9].into_iter());
        assert_eq!(new.settled(92_000), 0);
    }
}
