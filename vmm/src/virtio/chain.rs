//! A descriptor chain whose buffers were checked: [`Reader`] over what the driver wrote, [`Writer`] over what we may fill.
//!
//! Both only move forward, so a byte of the guest is read once: there is no second look at something that may have changed.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::device::{GuestMemory, Slice};
use super::queue::QueueError;

/// A piece of guest memory inside one region; [`super::queue::Queue`] makes none that is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: GuestAddress,
    /// Its length in bytes, at least 1.
    pub length: u32,
}

/// Why a chain could not be read or filled as wanted.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The chain is shorter than what its content needs.
    #[error("{wanted} bytes wanted, {left} left in the chain")]
    TooShort {
        /// Bytes wanted.
        wanted: usize,
        /// Bytes left.
        left: usize,
    },
    /// Guest memory under the chain went away.
    #[error("access to a buffer")]
    Memory(#[source] GuestMemoryError),
}

/// A chain taken from a queue. It is given back once, by value, with [`super::queue::Queue::add_used`].
#[derive(Debug)]
pub struct Chain {
    head: u16,
    /// Readable segments first.
    segments: Vec<Segment>,
    readable_count: usize,
    readable_length: u32,
    writable_length: u32,
}

impl Chain {
    /// An empty chain that keeps the allocation of `segments`.
    pub(super) fn new(head: u16, mut segments: Vec<Segment>) -> Self {
        segments.clear();
        Self { head, segments, readable_count: 0, readable_length: 0, writable_length: 0 }
    }

    pub(super) fn push(&mut self, segment: Segment, writable: bool, limit: usize) -> Result<(), QueueError> {
        if self.segments.len() >= limit {
            return Err(QueueError::TooLong { head: self.head, limit });
        }
        let total = self.readable_length.checked_add(self.writable_length);
        if total.and_then(|t| t.checked_add(segment.length)).is_none() {
            return Err(QueueError::TooLarge(self.head));
        }
        if writable {
            self.writable_length += segment.length;
        } else if self.segments.len() > self.readable_count {
            return Err(QueueError::Order(self.head));
        } else {
            self.readable_count += 1;
            self.readable_length += segment.length;
        }
        self.segments.push(segment);
        Ok(())
    }

    pub(super) fn into_segments(self) -> Vec<Segment> {
        self.segments
    }

    /// Index of the first descriptor: the chain's name while it is in flight.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes in the readable part.
    pub fn readable_length(&self) -> u32 {
        self.readable_length
    }

    /// Contiguous pieces in the writable part.
    pub fn writable_pieces(&self) -> usize {
        self.segments.len().saturating_sub(self.readable_count)
    }

    /// Bytes in the writable part.
    pub fn writable_length(&self) -> u32 {
        self.writable_length
    }

    /// Reads what the driver wrote, from its beginning.
    pub fn reader<'a>(&'a self, memory: &'a GuestMemory) -> Reader<'a> {
        let segments = self.segments.get(..self.readable_count).unwrap_or_default();
        Reader(Cursor { memory, segments, offset: 0, left: self.readable_length as usize })
    }

    /// Fills what the driver left for us, from its beginning.
    pub fn writer<'a>(&'a self, memory: &'a GuestMemory) -> Writer<'a> {
        let segments = self.segments.get(self.readable_count..).unwrap_or_default();
        Writer(Cursor { memory, segments, offset: 0, left: self.writable_length as usize })
    }
}

/// A position in a list of segments, with a bound on how far it may go.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    memory: &'a GuestMemory,
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind the position.
    offset: u32,
    /// Bytes ahead.
    left: usize,
}

impl<'a> Cursor<'a> {
    /// The next contiguous piece of at most `limit` bytes, and moves behind it.
    fn next_segment(&mut self, limit: usize) -> Option<Segment> {
        let (first, rest) = self.segments.split_first()?;
        let ahead = first.length.saturating_sub(self.offset);
        let length = ahead.min(u32::try_from(limit.min(self.left)).unwrap_or(u32::MAX));
        if length == 0 {
            return None;
        }
        let address = GuestAddress(first.address.0.wrapping_add(u64::from(self.offset)));
        if length == ahead {
            (self.segments, self.offset) = (rest, 0);
        } else {
            self.offset += length;
        }
        self.left -= length as usize;
        Some(Segment { address, length })
    }

    fn next(&mut self, limit: usize) -> Result<Option<Slice<'a>>, ChainError> {
        let Some(segment) = self.next_segment(limit) else { return Ok(None) };
        self.memory.get_slice(segment.address, segment.length as usize).map(Some).map_err(ChainError::Memory)
    }

    fn need(&self, wanted: usize) -> Result<(), ChainError> {
        if wanted > self.left {
            return Err(ChainError::TooShort { wanted, left: self.left });
        }
        Ok(())
    }

    /// Calls `each` with the next `length` bytes piece by piece.
    fn pieces(
        &mut self,
        length: usize,
        mut each: impl FnMut(Slice<'a>) -> Result<(), ChainError>,
    ) -> Result<(), ChainError> {
        self.need(length)?;
        let mut wanted = length;
        while let Some(slice) = self.next(wanted)? {
            wanted -= slice.len();
            each(slice)?;
        }
        Ok(())
    }

    fn split(&mut self, length: usize) -> Result<Self, ChainError> {
        self.need(length)?;
        let front = Self { left: length, ..*self };
        self.pieces(length, |_| Ok(()))?;
        Ok(front)
    }
}

/// What the driver wrote, from a position on.
#[derive(Clone, Copy)]
pub struct Reader<'a>(Cursor<'a>);

impl<'a> Reader<'a> {
    /// Bytes ahead.
    pub fn left(&self) -> usize {
        self.0.left
    }

    /// Fills `data` and moves behind what was read.
    ///
    /// # Errors
    /// Fewer bytes are left.
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), ChainError> {
        let mut done = 0;
        let length = data.len();
        self.0.pieces(length, |slice| {
            let to = data.get_mut(done..).unwrap_or_default();
            done += slice.copy_to(to);
            Ok(())
        })
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// Fewer bytes are left.
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], ChainError> {
        let mut data = [0; N];
        self.read(&mut data)?;
        Ok(data)
    }

    /// Cuts off the next `length` bytes as a reader of their own and moves behind them.
    ///
    /// # Errors
    /// Fewer bytes are left.
    pub fn split(&mut self, length: usize) -> Result<Self, ChainError> {
        self.0.split(length).map(Reader)
    }

    /// The next contiguous piece of at most `limit` bytes, by its place; moves behind it.
    pub fn next_segment(&mut self, limit: usize) -> Option<Segment> {
        self.0.next_segment(limit)
    }

    /// The next contiguous piece of at most `limit` bytes; moves behind it.
    ///
    /// # Errors
    /// Guest memory went away.
    pub fn next_slice(&mut self, limit: usize) -> Result<Option<Slice<'a>>, ChainError> {
        self.0.next(limit)
    }
}

/// What the driver left for the device to fill, from a position on.
#[derive(Clone, Copy)]
pub struct Writer<'a>(Cursor<'a>);

impl<'a> Writer<'a> {
    /// Bytes ahead.
    pub fn left(&self) -> usize {
        self.0.left
    }

    /// Writes all of `data` and moves behind it.
    ///
    /// # Errors
    /// Fewer bytes are left; then nothing was written.
    pub fn write(&mut self, data: &[u8]) -> Result<(), ChainError> {
        let mut done = 0;
        self.0.pieces(data.len(), |slice| {
            let end = done + slice.len();
            slice
                .write_slice(data.get(done..end).unwrap_or_default(), 0)
                .map_err(|e| ChainError::Memory(e.into()))?;
            done = end;
            Ok(())
        })
    }

    /// Cuts off the next `length` bytes as a writer of their own and moves behind them.
    ///
    /// # Errors
    /// Fewer bytes are left.
    pub fn split(&mut self, length: usize) -> Result<Self, ChainError> {
        self.0.split(length).map(Writer)
    }

    /// The next contiguous piece of at most `limit` bytes, by its place; moves behind it.
    pub fn next_segment(&mut self, limit: usize) -> Option<Segment> {
        self.0.next_segment(limit)
    }

    /// The next contiguous piece of at most `limit` bytes; moves behind it.
    ///
    /// # Errors
    /// Guest memory went away.
    pub fn next_slice(&mut self, limit: usize) -> Result<Option<Slice<'a>>, ChainError> {
        self.0.next(limit)
    }
}
