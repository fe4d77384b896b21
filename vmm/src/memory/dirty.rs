//! Which pages of guest memory were written by the VMM: a bit per page, kept by the memory's own accessors while tracking
//! is on. What the guest writes KVM notes; a reader of the map joins both.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// The map of a region. Off, it costs a look at a pointer per write.
#[derive(Debug, Default)]
pub struct DirtyMap(OnceLock<Box<[AtomicU64]>>);

/// The part of a map from an offset on.
#[derive(Debug, Clone, Copy)]
pub struct DirtySlice<'a> {
    map: &'a DirtyMap,
    offset: usize,
}

impl<'a> DirtySlice<'a> {
    /// The map that this is a part of.
    pub fn map(&self) -> &'a DirtyMap {
        self.map
    }
}

impl DirtyMap {
    /// Begins to note what is written to a region of `length` bytes.
    pub fn track(&self, length: usize) {
        self.0.get_or_init(|| (0..length.div_ceil(PAGE * 64)).map(|_| AtomicU64::new(0)).collect());
    }

    /// Adds the marks to `words`, a bit per page.
    pub fn copy_into(&self, words: &mut [u64]) {
        for (mine, word) in self.0.get().into_iter().flatten().zip(words) {
            *word |= mine.load(Ordering::Relaxed);
        }
    }

    /// Adds the marks to `words`, a bit per page, and clears them.
    pub fn take_into(&self, words: &mut [u64]) {
        for (mine, word) in self.0.get().into_iter().flatten().zip(words) {
            // Most words are 0: those cost no write.
            if mine.load(Ordering::Relaxed) != 0 {
                *word |= mine.swap(0, Ordering::Relaxed);
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyMap {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyMap {
    fn mark_dirty(&self, offset: usize, length: usize) {
        let (Some(words), Some(last)) = (self.0.get(), length.checked_sub(1)) else { return };
        let pages = offset / PAGE..=offset.saturating_add(last) / PAGE;
        for page in pages {
            let Some(word) = words.get(page / 64) else { return };
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE;
        let word = self.0.get().and_then(|words| words.get(page / 64));
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice { map: self, offset }
    }
}

impl NewBitmap for DirtyMap {
    fn with_len(_length: usize) -> Self {
        Self::default()
    }
}

impl WithBitmapSlice<'_> for DirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, length: usize) {
        self.map.mark_dirty(self.offset.saturating_add(offset), length);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.map.dirty_at(self.offset.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { map: self.map, offset: self.offset.saturating_add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_noted_before_tracking_and_each_page_once_after_it() {
        let map = DirtyMap::default();
        map.mark_dirty(0, 100);
        map.track(200 * PAGE);
        let mut words = [0; 4];
        map.take_into(&mut words);
        assert_eq!(words, [0; 4]);
        map.slice_at(PAGE).slice_at(PAGE - 1).mark_dirty(0, 2);
        map.mark_dirty(199 * PAGE, PAGE);
        map.mark_dirty(0, 0);
        map.take_into(&mut words);
        assert_eq!(words, [0b110, 0, 0, 1 << 7]);
        assert!(!map.dirty_at(PAGE));
    }

    #[test]
    fn a_mark_outside_the_region_is_ignored() {
        let map = DirtyMap::default();
        map.track(PAGE);
        map.mark_dirty(usize::MAX - 1, usize::MAX);
        map.mark_dirty(64 * PAGE, 1);
        assert!(!map.dirty_at(0));
    }
}
