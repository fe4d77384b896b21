//! Sets of pages of guest memory, by their number in the memory file, and their extents.

/// Most extents of a list: they take half a megabyte then.
pub const EXTENTS_MAX: usize = 1 << 16;

/// Pages one after the other: the first, and how many.
pub type Extent = (u32, u32);

/// A set of pages, a bit each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pages(Vec<u64>);

impl Pages {
    /// An empty set of pages with numbers below `count`.
    pub fn new(count: u64) -> Self {
        Self(vec![0; usize::try_from(count.div_ceil(64)).unwrap_or(0)])
    }

    /// The words of the pages from `first` on, a multiple of 64.
    pub fn words_from(&mut self, first: u64) -> &mut [u64] {
        usize::try_from(first / 64).ok().and_then(|at| self.0.get_mut(at..)).unwrap_or_default()
    }

    /// Adds all pages of `other`.
    pub fn add_all(&mut self, other: &Self) {
        for (mine, other) in self.0.iter_mut().zip(&other.0) {
            *mine |= other;
        }
    }

    /// Adds the pages of an extent.
    pub fn add(&mut self, (first, count): Extent) {
        let (mut page, end) = (u64::from(first), u64::from(first) + u64::from(count));
        while page < end {
            let Some(word) = usize::try_from(page / 64).ok().and_then(|at| self.0.get_mut(at)) else {
                return;
            };
            let (bit, left) = (page % 64, end - page);
            let upper = if left >= 64 - bit { u64::MAX } else { (1 << (bit + left)) - 1 };
            *word |= upper & u64::MAX << bit;
            page = (page / 64 + 1) * 64;
        }
    }

    /// Whether a page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|at| self.0.get(at));
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.0.fill(0);
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The set as extents, ascending and as long as they can be.
    pub fn runs(&self) -> impl Iterator<Item = Extent> {
        Runs { words: &self.0, at: 0 }
    }

    /// Its pages from `first` to before `end`, both multiples of 64 or the end, as extents.
    pub fn within(&self, first: u64, end: u64) -> impl Iterator<Item = Extent> {
        let number = |page: u64| u32::try_from(page).unwrap_or(u32::MAX);
        let (words, at) = (usize::try_from(end.div_ceil(64)).unwrap_or(usize::MAX), number(first));
        Runs { words: self.0.get(..words).unwrap_or(&self.0), at }
    }

    /// The set as at most [`EXTENTS_MAX`] extents. When there are more, those that are nearest to each other become one with
    /// the pages between them.
    pub fn extents(&self) -> Vec<Extent> {
        let mut gap = 0;
        loop {
            let mut extents: Vec<Extent> = vec![];
            for (first, count) in self.runs() {
                if let Some((start, length)) = extents.last_mut()
                    && first - (*start + *length) <= gap
                {
                    *length = first + count - *start;
                    continue;
                }
                extents.push((first, count));
                if extents.len() > EXTENTS_MAX {
                    break;
                }
            }
            if extents.len() <= EXTENTS_MAX {
                return extents;
            }
            gap = gap * 2 + 1;
        }
    }
}

struct Runs<'a> {
    words: &'a [u64],
    at: u32,
}

impl Runs<'_> {
    /// The next page from `self.at` on that is in the set, or is not.
    fn next_page(&self, wanted: bool) -> Option<u32> {
        let mut word_at = usize::try_from(self.at / 64).ok()?;
        let mut mask = u64::MAX << (self.at % 64);
        loop {
            let word = self.words.get(word_at)?;
            let found = if wanted { *word } else { !*word } & mask;
            if found != 0 {
                return u32::try_from(word_at * 64).ok()?.checked_add(found.trailing_zeros());
            }
            (word_at, mask) = (word_at + 1, u64::MAX);
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        let first = self.next_page(true)?;
        self.at = first;
        let end = self.next_page(false).or_else(|| u32::try_from(self.words.len() * 64).ok())?;
        self.at = end;
        Some((first, end - first))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn too_many_extents_become_one_where_they_are_near() {
        let mut pages = Pages::new(1 << 18);
        // Every other page, and one far away from the others.
        for page in 0..(1 << 16) + 10 {
            pages.add((page * 2, 1));
        }
        pages.add(((1 << 18) - 1, 1));
        let extents = pages.extents();
        assert_eq!(extents, [(0, (1 << 17) + 19), ((1 << 18) - 1, 1)]);
    }

    proptest! {
        #[test]
        fn extents_are_the_set(added in proptest::collection::vec((0u32..900, 0u32..150), 0..30)) {
            let mut pages = Pages::new(1000);
            let mut model = vec![false; 1024];
            for (first, count) in added {
                pages.add((first, count));
                (first..first + count).take_while(|page| *page < 1024).for_each(|p| model[p as usize] = true);
            }
            let mut found = vec![false; 1024];
            let mut end = None;
            for (first, count) in pages.runs() {
                prop_assert!(count > 0 && end.is_none_or(|end| first > end));
                (first..first + count).for_each(|page| found[page as usize] = true);
                end = Some(first + count);
            }
            prop_assert_eq!(&found, &model);
            prop_assert_eq!(pages.count(), model.iter().filter(|page| **page).count() as u64);
            prop_assert_eq!(pages.extents(), pages.runs().collect::<Vec<_>>());
            let mut copy = Pages::new(1000);
            pages.runs().for_each(|run| copy.add(run));
            prop_assert_eq!(copy, pages);
        }
    }
}
