//! Split virtqueue, the device's side (virtio 1.3 section 2.7): take a chain, give it back used, suppress notifications.
//!
//! Everything in the rings was written by the guest and may change while it is read. So each field is read once into a
//! local value, each walk is bounded, and a head that is in flight is refused until it was given back. The first violation
//! is an error; the device then asks for a reset and touches the queue no more.
//!
//! ```text
//!   driver                         device
//!   avail.idx += n  ──── pop() ──► Chain (owned, in flight)
//!                                    │ add_used(chain, written)   staged
//!   used.idx  += n  ◄── publish() ───┘ one index update for all staged entries
//! ```

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::chain::{Chain, Segment};
use super::device::GuestMemory;

/// Largest possible queue size (virtio 1.3 section 2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;
/// Most buffers of one chain: what one vectored system call takes (`IOV_MAX` of Linux). Linux drivers may exceed the queue
/// size with an indirect table, so the queue size is no bound.
pub const CHAIN_BUFFERS_MAX: usize = 1024;

const DESCRIPTOR_SIZE: u64 = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
/// Lists of segments kept for reuse, so that a steady load allocates nothing.
const SPARE_MAX: usize = 64;

/// Why a queue cannot be used, or can be used no longer.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Not a power of two from 1 to [`QUEUE_SIZE_MAX`].
    #[error("queue size {0} is not a power of two from 1 to {QUEUE_SIZE_MAX}")]
    Size(u16),
    /// An area does not have the alignment of virtio 1.3 section 2.7.
    #[error("{area} at {address:#x} is not aligned to {alignment} bytes")]
    Misaligned {
        /// Which area.
        area: &'static str,
        /// Its guest address.
        address: u64,
        /// The alignment it needs, in bytes.
        alignment: u64,
    },
    /// An area is not wholly guest memory.
    #[error("{area} of {length} bytes at {address:#x} is not inside guest memory")]
    AreaOutside {
        /// Which area.
        area: &'static str,
        /// Its guest address.
        address: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The available index moved further than the queue has entries.
    #[error("available index jumped from {from} to {to} in a queue of {size}")]
    AvailableJump {
        /// Next entry the device expected.
        from: u16,
        /// Index the driver wrote.
        to: u16,
        /// Queue size.
        size: u16,
    },
    /// A descriptor index is outside its table.
    #[error("descriptor {index} in a table of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: u16,
    },
    /// The driver offered a chain that the device still has.
    #[error("head {0} was offered again while it is in flight")]
    InFlight(u16),
    /// More buffers than the bound; also what a loop comes to.
    #[error("chain at head {head} has a loop or more than {limit} descriptors")]
    TooLong {
        /// Its head.
        head: u16,
        /// The bound.
        limit: usize,
    },
    /// Buffers of 4 GiB or more in total (virtio 1.3 section 2.7.5.2 allows less than that to be told in a used entry).
    #[error("chain at head {0} has 4 GiB or more")]
    TooLarge(u16),
    /// An indirect table that is empty, too long, no multiple of a descriptor, inside another one, or continued.
    #[error("chain at head {head} has an indirect table of {length} bytes with flags {flags:#x}")]
    Indirect {
        /// Head of the chain.
        head: u16,
        /// Length field.
        length: u32,
        /// Flags field.
        flags: u16,
    },
    /// A buffer for the device to read comes after one to write (virtio 1.3 section 2.7.4.2).
    #[error("chain at head {0} has a readable buffer after a writable one")]
    Order(u16),
    /// A buffer is not wholly guest memory.
    #[error("buffer of {length} bytes at {address:#x} is not inside guest memory")]
    BufferOutside {
        /// Guest address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Guest memory under the rings went away.
    #[error("access to the rings")]
    Ring(#[source] GuestMemoryError),
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, table: GuestAddress, index: u16) -> Result<Self, QueueError> {
        // The tables were checked to lie in guest memory, so the sum does not wrap.
        let at = GuestAddress(table.0.wrapping_add(DESCRIPTOR_SIZE * u64::from(index)));
        let bytes: [u8; 16] = memory.read_obj(at).map_err(QueueError::Ring)?;
        let whole = u128::from_le_bytes(bytes);
        Ok(Self {
            address: low64(whole),
            length: low32(whole >> 64),
            flags: low16(whole >> 96),
            next: low16(whole >> 112),
        })
    }

    fn is(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

#[expect(clippy::cast_possible_truncation, reason = "cutting off the upper bits is the purpose")]
fn low64(value: u128) -> u64 {
    value as u64
}

#[expect(clippy::cast_possible_truncation, reason = "cutting off the upper bits is the purpose")]
fn low32(value: u128) -> u32 {
    value as u32
}

#[expect(clippy::cast_possible_truncation, reason = "cutting off the upper bits is the purpose")]
fn low16(value: u128) -> u16 {
    value as u16
}

/// One virtqueue as its device sees it. Where it lies and how long it is never changes after creation.
pub struct Queue {
    index: u16,
    size: u16,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    event_idx: bool,
    memory: GuestMemory,
    /// Next entry of the available ring to take.
    next_available: Wrapping<u16>,
    /// The driver's index as last read.
    seen_available: Wrapping<u16>,
    /// Next entry of the used ring to write.
    next_used: Wrapping<u16>,
    /// The used index that the driver can see.
    published_used: Wrapping<u16>,
    in_flight: Vec<bool>,
    in_flight_count: u16,
    spare: Vec<Vec<Segment>>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("index", &self.index)
            .field("size", &self.size)
            .field("next_available", &self.next_available)
            .field("next_used", &self.next_used)
            .field("in_flight", &self.in_flight_count)
            .finish_non_exhaustive()
    }
}

impl Queue {
    /// Queue `index` with `size` entries whose three areas lie at these guest addresses. `event_idx` says whether
    /// `VIRTIO_F_EVENT_IDX` was agreed on.
    ///
    /// # Errors
    /// The size is none, or an area is misaligned or not inside guest memory.
    pub fn new(
        index: u16,
        size: u16,
        descriptors: u64,
        available: u64,
        used: u64,
        event_idx: bool,
        memory: &GuestMemory,
    ) -> Result<Self, QueueError> {
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(QueueError::Size(size));
        }
        let entries = u64::from(size);
        for (area, address, alignment, length) in [
            ("descriptor table", descriptors, 16, DESCRIPTOR_SIZE * entries),
            ("available ring", available, 2, 6 + 2 * entries),
            ("used ring", used, 4, 6 + 8 * entries),
        ] {
            if !address.is_multiple_of(alignment) {
                return Err(QueueError::Misaligned { area, address, alignment });
            }
            let inside = usize::try_from(length).is_ok_and(|n| memory.check_range(GuestAddress(address), n));
            if !inside {
                return Err(QueueError::AreaOutside { area, address, length });
            }
        }
        Ok(Self {
            index,
            size,
            descriptors: GuestAddress(descriptors),
            available: GuestAddress(available),
            used: GuestAddress(used),
            event_idx,
            memory: memory.clone(),
            next_available: Wrapping(0),
            seen_available: Wrapping(0),
            next_used: Wrapping(0),
            published_used: Wrapping(0),
            in_flight: vec![false; usize::from(size)],
            in_flight_count: 0,
            spare: Vec::new(),
        })
    }

    /// A queue that the driver did not enable: it never has a chain.
    pub fn disabled(index: u16) -> Self {
        Self {
            index,
            size: 0,
            descriptors: GuestAddress(0),
            available: GuestAddress(0),
            used: GuestAddress(0),
            event_idx: false,
            memory: GuestMemory::default(),
            next_available: Wrapping(0),
            seen_available: Wrapping(0),
            next_used: Wrapping(0),
            published_used: Wrapping(0),
            in_flight: Vec::new(),
            in_flight_count: 0,
            spare: Vec::new(),
        }
    }

    /// Continues a queue of a snapshot whose used index was `used`. At rest each chain before it was given back; what was
    /// taken after it is taken again.
    pub fn continue_at(&mut self, used: u16) {
        let used = Wrapping(used);
        self.next_available = used;
        self.seen_available = used;
        self.next_used = used;
        self.published_used = used;
    }

    /// Whether the driver enabled this queue.
    pub fn is_enabled(&self) -> bool {
        self.size != 0
    }

    /// Number of this queue in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of entries; 0 when not enabled.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest address and length in bytes of descriptor table, available ring and used ring, for a kernel that serves the
    /// queue.
    pub fn areas(&self) -> [(u64, usize); 3] {
        let entries = usize::from(self.size);
        [
            (self.descriptors.0, 16 * entries),
            (self.available.0, 6 + 2 * entries),
            (self.used.0, 6 + 8 * entries),
        ]
    }

    /// Position in the available ring of the chain that is taken next.
    pub fn next_available(&self) -> u16 {
        self.next_available.0
    }

    /// Chains that were taken and not yet given back.
    pub fn in_flight(&self) -> u16 {
        self.in_flight_count
    }

    /// Takes the next chain that the driver made available, if there is one.
    ///
    /// # Errors
    /// What the driver wrote breaks a rule of the ring.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if !self.has_available()? {
            return Ok(None);
        }
        let slot = self.next_available.0 & (self.size - 1);
        let at = self.ring_address(self.available, 4 + 2 * u64::from(slot));
        // The acquire load of the index in has_available() orders this read and those of the descriptors after it.
        let head = u16::from_le(self.memory.load(at, Ordering::Relaxed).map_err(QueueError::Ring)?);
        match self.in_flight.get(usize::from(head)) {
            None => return Err(QueueError::Index { index: head, size: self.size }),
            Some(true) => return Err(QueueError::InFlight(head)),
            Some(false) => {}
        }
        let segments = self.spare.pop().unwrap_or_default();
        let chain = self.walk(Chain::new(head, segments))?;
        if let Some(flag) = self.in_flight.get_mut(usize::from(head)) {
            *flag = true;
        }
        self.in_flight_count += 1;
        self.next_available += 1;
        Ok(Some(chain))
    }

    /// Whether the driver made more chains available than were taken.
    ///
    /// # Errors
    /// The driver's index is impossible.
    pub fn has_available(&mut self) -> Result<bool, QueueError> {
        if !self.is_enabled() {
            return Ok(false);
        }
        if self.next_available != self.seen_available {
            return Ok(true);
        }
        let at = self.ring_address(self.available, 2);
        let index =
            Wrapping(u16::from_le(self.memory.load(at, Ordering::Acquire).map_err(QueueError::Ring)?));
        if (index - self.next_available).0 > self.size {
            return Err(QueueError::AvailableJump {
                from: self.next_available.0,
                to: index.0,
                size: self.size,
            });
        }
        self.seen_available = index;
        Ok(index != self.next_available)
    }

    fn walk(&self, mut chain: Chain) -> Result<Chain, QueueError> {
        let head = chain.head();
        let direct_max = usize::from(self.size).min(CHAIN_BUFFERS_MAX);
        let mut descriptor = Descriptor::read(&self.memory, self.descriptors, head)?;
        let mut direct = 1;
        while !descriptor.is(DESC_F_INDIRECT) {
            self.add_buffer(&mut chain, descriptor)?;
            if !descriptor.is(DESC_F_NEXT) {
                return Ok(chain);
            }
            direct += 1;
            if direct > direct_max {
                return Err(QueueError::TooLong { head, limit: direct_max });
            }
            if descriptor.next >= self.size {
                return Err(QueueError::Index { index: descriptor.next, size: self.size });
            }
            descriptor = Descriptor::read(&self.memory, self.descriptors, descriptor.next)?;
        }
        self.walk_indirect(chain, descriptor)
    }

    fn walk_indirect(&self, mut chain: Chain, table: Descriptor) -> Result<Chain, QueueError> {
        let head = chain.head();
        let bad = |d: Descriptor| QueueError::Indirect { head, length: d.length, flags: d.flags };
        let bytes = u64::from(table.length);
        let entries = bytes / DESCRIPTOR_SIZE;
        let size = u16::try_from(entries).map_err(|_| bad(table))?;
        let whole = size != 0 && bytes.is_multiple_of(DESCRIPTOR_SIZE) && !table.is(DESC_F_NEXT);
        if !whole || usize::from(size) > CHAIN_BUFFERS_MAX {
            return Err(bad(table));
        }
        let address = GuestAddress(table.address);
        if !self.memory.check_range(address, table.length as usize) {
            return Err(QueueError::BufferOutside { address: table.address, length: table.length });
        }
        let mut index = 0;
        for _ in 0..size {
            let descriptor = Descriptor::read(&self.memory, address, index)?;
            if descriptor.is(DESC_F_INDIRECT) {
                return Err(bad(descriptor));
            }
            self.add_buffer(&mut chain, descriptor)?;
            if !descriptor.is(DESC_F_NEXT) {
                return Ok(chain);
            }
            index = descriptor.next;
            if index >= size {
                return Err(QueueError::Index { index, size });
            }
        }
        Err(QueueError::TooLong { head, limit: usize::from(size) })
    }

    fn add_buffer(&self, chain: &mut Chain, descriptor: Descriptor) -> Result<(), QueueError> {
        let Descriptor { address, length, .. } = descriptor;
        if length == 0 {
            return Ok(());
        }
        let outside = QueueError::BufferOutside { address, length };
        let mut at = address;
        // A buffer over the border of two regions becomes one segment in each: a segment is contiguous in our memory too.
        for slice in self.memory.get_slices(GuestAddress(address), length as usize) {
            let Ok(piece) = slice.map(|s| u32::try_from(s.len()).unwrap_or(length)) else {
                return Err(outside);
            };
            let segment = Segment { address: GuestAddress(at), length: piece };
            chain.push(segment, descriptor.is(DESC_F_WRITE), CHAIN_BUFFERS_MAX)?;
            at = at.wrapping_add(u64::from(piece));
        }
        Ok(())
    }

    /// Gives `chain` back with `written` bytes filled in. The driver sees it after [`Self::publish`]. A disabled queue drops
    /// it: so ends what was in flight when the device failed.
    ///
    /// # Errors
    /// Guest memory under the ring went away.
    pub fn add_used(&mut self, chain: Chain, written: u32) -> Result<(), QueueError> {
        if !self.is_enabled() {
            return Ok(());
        }
        let slot = self.next_used.0 & (self.size - 1);
        let at = self.ring_address(self.used, 4 + 8 * u64::from(slot));
        let entry = u64::from(chain.head()) | u64::from(written) << 32;
        self.memory.write_obj(entry.to_le_bytes(), at).map_err(QueueError::Ring)?;
        if let Some(flag) = self.in_flight.get_mut(usize::from(chain.head())) {
            *flag = false;
        }
        self.in_flight_count = self.in_flight_count.saturating_sub(1);
        self.next_used += 1;
        if self.spare.len() < SPARE_MAX {
            self.spare.push(chain.into_segments());
        }
        Ok(())
    }

    /// Shows the driver all chains given back so far, with one index update. Returns whether it wants an interrupt for them.
    ///
    /// # Errors
    /// Guest memory under the ring went away.
    #[must_use = "true means that the driver waits for an interrupt"]
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        let (old, new) = (self.published_used, self.next_used);
        if old == new {
            return Ok(false);
        }
        let index_at = self.ring_address(self.used, 2);
        self.memory.store(new.0.to_le(), index_at, Ordering::Release).map_err(QueueError::Ring)?;
        self.published_used = new;
        // The driver writes used_event (or its flag) and then reads the used index; we do it the other way round. A full
        // barrier on both sides makes sure that at least one of us sees the other's write (virtio 1.3 section 2.7.7).
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags =
                self.memory.load::<u16>(self.available, Ordering::Relaxed).map_err(QueueError::Ring)?;
            return Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0);
        }
        let at = self.ring_address(self.available, 4 + 2 * u64::from(self.size));
        let event =
            Wrapping(u16::from_le(self.memory.load(at, Ordering::Relaxed).map_err(QueueError::Ring)?));
        Ok(crosses(event, new, old))
    }

    /// Asks the driver not to kick for new chains: the device is going to look by itself.
    ///
    /// # Errors
    /// Guest memory under the ring went away.
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        // With EVENT_IDX there is nothing to do: the event index stays behind, so nothing crosses it.
        if self.is_enabled() && !self.event_idx {
            self.memory
                .store(USED_F_NO_NOTIFY.to_le(), self.used, Ordering::Relaxed)
                .map_err(QueueError::Ring)?;
        }
        Ok(())
    }

    /// Asks the driver to kick for the next chain. Returns whether a chain arrived meanwhile: the driver may then not kick,
    /// and the caller has to look again before it sleeps.
    ///
    /// # Errors
    /// Guest memory under the ring went away, or the driver's index is impossible.
    #[must_use = "true means that no kick may come for what is already there"]
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        if !self.is_enabled() {
            return Ok(false);
        }
        let (at, value) = if self.event_idx {
            (self.ring_address(self.used, 4 + 8 * u64::from(self.size)), self.next_available.0)
        } else {
            (self.used, 0)
        };
        self.memory.store(value.to_le(), at, Ordering::Relaxed).map_err(QueueError::Ring)?;
        // As in publish(): our request must be visible before we look at the available index.
        fence(Ordering::SeqCst);
        self.has_available()
    }

    fn ring_address(&self, base: GuestAddress, offset: u64) -> GuestAddress {
        // The areas were checked to lie in guest memory, so the sum does not wrap.
        GuestAddress(base.0.wrapping_add(offset))
    }
}

/// Whether moving an index from `old` to `new` passes `event` (`vring_need_event` of virtio 1.3 section 2.7.7).
fn crosses(event: Wrapping<u16>, new: Wrapping<u16>, old: Wrapping<u16>) -> bool {
    (new - event - Wrapping(1)) < (new - old)
}
