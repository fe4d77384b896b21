//! How much an import may take. What is imported comes from users: each dimension has an end.

/// Bounds of one import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of the source as it comes.
    pub source_bytes: u64,
    /// Most bytes after decompression, all layers together. It bounds the space in the spool directory.
    pub expanded_bytes: u64,
    /// Most bytes of the finished image.
    pub image_bytes: u64,
    /// Most entries of all archives together.
    pub entries: u64,
    /// Most bytes of memory for names, link targets and attributes.
    pub memory_bytes: u64,
}

impl Default for Limits {
    /// Room for the largest images in use (tens of GiB of files), and for 512 MiB of memory.
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        Self {
            source_bytes: 32 * GIB,
            expanded_bytes: 64 * GIB,
            image_bytes: 64 * GIB,
            entries: 2_000_000,
            memory_bytes: GIB / 2,
        }
    }
}

/// A bound that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there are more than {limit} {what}")]
pub struct LimitReached {
    /// Of what there is too much.
    pub what: &'static str,
    /// How much is allowed.
    pub limit: u64,
}

/// Counts towards one bound.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    what: &'static str,
    limit: u64,
    used: u64,
}

impl Budget {
    /// Nothing used yet.
    pub fn new(what: &'static str, limit: u64) -> Self {
        Self { what, limit, used: 0 }
    }

    /// Takes `amount`.
    ///
    /// # Errors
    /// That is more than is left.
    pub fn take(&mut self, amount: u64) -> Result<(), LimitReached> {
        self.used = self.used.saturating_add(amount);
        if self.used > self.limit {
            return Err(LimitReached { what: self.what, limit: self.limit });
        }
        Ok(())
    }
}
