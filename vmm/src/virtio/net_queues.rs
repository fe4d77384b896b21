//! The two directions of a network card: frames to the guest, frames from the guest. [`super::net`] says when they run.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::chain::{Chain, ChainError};
use super::device::GuestMemory;
use super::iovec::IoVecs;
use super::net_tap::{FRAME_MAX, HEADER, Outcome, Tap};
use super::queue::{Queue, QueueError};

/// Frames in one direction before other devices get their turn.
const FRAMES_PER_TURN: usize = 64;
/// Place of `num_buffers` in the header.
const NUM_BUFFERS_AT: usize = 10;

/// Why the device stopped until its next reset.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetFailure {
    #[error("queue")]
    Queue(#[from] QueueError),
    #[error("frame buffer")]
    Chain(#[from] ChainError),
    #[error("events of the device")]
    Event(#[source] io::Error),
    #[error("offloads of the tap")]
    Offload(#[source] io::Error),
}

/// The host's side.
pub(super) struct Host {
    pub(super) tap: Tap,
    /// The interface was removed.
    pub(super) gone: bool,
    /// A frame that could not go straight into guest memory. Allocated with the first of them.
    frame: Vec<u8>,
    pub(super) counts: Counts,
}

/// Frames and bytes without headers.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) received: u64,
    pub(super) received_bytes: u64,
    pub(super) received_dropped: u64,
    pub(super) received_copied: u64,
    pub(super) sent: u64,
    pub(super) sent_bytes: u64,
    pub(super) sent_dropped: u64,
}

/// Frames to the guest.
pub(super) struct ToGuest {
    memory: Arc<GuestMemory>,
    pub(super) queue: Queue,
    mergeable: bool,
    /// Chains taken and not yet filled, and their pieces in the same order.
    held: VecDeque<Chain>,
    room: IoVecs,
    /// Bytes of the frame in [`Host::frame`] that waits for buffers.
    waiting: Option<usize>,
}

/// Frames from the guest.
pub(super) struct FromGuest {
    memory: Arc<GuestMemory>,
    pub(super) queue: Queue,
    frame: IoVecs,
    /// A frame that the tap had no room for.
    waiting: Option<Chain>,
}

/// Why a direction stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The tap has no frame, or no room.
    Tap,
    /// The driver has no buffer, or no frame.
    Driver,
    /// Its turn is over.
    Turn,
}

impl Host {
    pub(super) fn new(tap: Tap) -> Self {
        Self { tap, gone: false, frame: Vec::new(), counts: Counts::default() }
    }
}

impl ToGuest {
    pub(super) fn new(memory: &Arc<GuestMemory>, queue: Queue, mergeable: bool) -> Self {
        let (memory, room) = (Arc::clone(memory), IoVecs::new(memory));
        Self { memory, queue, mergeable, held: VecDeque::new(), room, waiting: None }
    }

    /// Takes no frame any more.
    pub(super) fn stop(&mut self) {
        self.queue = Queue::disabled(0);
        self.held.clear();
        self.room.clear();
    }

    pub(super) fn run(&mut self, host: &mut Host) -> Result<Stop, NetFailure> {
        if !self.queue.is_enabled() || host.gone {
            return Ok(Stop::Driver);
        }
        for _ in 0..FRAMES_PER_TURN {
            if let Some(length) = self.waiting {
                if !self.scatter(length, host)? {
                    return Ok(Stop::Driver);
                }
                self.waiting = None;
                continue;
            }
            self.hold(FRAME_MAX)?;
            // Without mergeable buffers a frame has to fit in one chain.
            let room = if self.mergeable { self.room.left() } else { self.first_length() };
            if room == 0 {
                return Ok(Stop::Driver);
            }
            let straight = room >= FRAME_MAX;
            let outcome = if straight {
                host.tap.receive(&self.room)
            } else {
                host.frame.resize(FRAME_MAX, 0);
                host.tap.receive_here(&mut host.frame)
            };
            match outcome {
                Outcome::Done(length) if length < HEADER => host.counts.received_dropped += 1,
                Outcome::Done(length) if straight => self.give_back(length, host)?,
                Outcome::Done(length) => self.waiting = Some(length),
                Outcome::Refused => host.counts.received_dropped += 1,
                Outcome::Wait => return Ok(Stop::Tap),
                Outcome::Gone => {
                    host.gone = true;
                    return Ok(Stop::Driver);
                }
            }
        }
        Ok(Stop::Turn)
    }

    fn first_length(&self) -> usize {
        self.held.front().map_or(0, |chain| chain.writable_length() as usize)
    }

    /// Takes chains until they have `wanted` bytes, or there are no more and the driver kicks for the next one.
    fn hold(&mut self, wanted: usize) -> Result<(), NetFailure> {
        while self.room.left() < wanted && (self.mergeable || self.held.is_empty()) {
            match self.queue.pop()? {
                Some(chain) => {
                    let before = self.room.count();
                    let all = self.room.add_writable(chain.writer(&self.memory))?;
                    let empty = self.room.count() == before;
                    self.held.push_back(chain);
                    if !all || empty {
                        // More pieces than one call takes, or nothing to fill: no driver does that.
                        let left = self.room.left();
                        return Err(ChainError::TooShort { wanted, left }.into());
                    }
                }
                None if self.queue.enable_kicks()? => {}
                None => break,
            }
        }
        Ok(())
    }

    /// Copies the waiting frame into chains; false when there are too few.
    fn scatter(&mut self, length: usize, host: &mut Host) -> Result<bool, NetFailure> {
        self.hold(length)?;
        if self.held.is_empty() || (self.mergeable && self.room.left() < length) {
            return Ok(false);
        }
        if !self.mergeable && self.first_length() < length {
            // It is longer than what the driver promised to take, and the next chain is no longer.
            host.counts.received_dropped += 1;
            return Ok(true);
        }
        let mut rest = host.frame.get(..length).unwrap_or_default();
        for chain in &self.held {
            let (part, behind) = rest.split_at(rest.len().min(chain.writable_length() as usize));
            chain.writer(&self.memory).write(part)?;
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        host.counts.received_copied += 1;
        self.give_back(length, host)?;
        Ok(true)
    }

    /// Gives back the chains that a frame of `length` bytes filled.
    fn give_back(&mut self, length: usize, host: &mut Host) -> Result<(), NetFailure> {
        let (mut count, mut covered) = (0, 0);
        for chain in &self.held {
            count += 1;
            covered += chain.writable_length() as usize;
            if covered >= length {
                break;
            }
        }
        if let Some(first) = self.held.front() {
            let mut header = first.writer(&self.memory);
            header.split(NUM_BUFFERS_AT)?;
            header.write(&u16::to_le_bytes(count))?;
        }
        let mut rest = u32::try_from(length).unwrap_or(0);
        for _ in 0..count {
            let Some(chain) = self.held.pop_front() else { break };
            self.room.drop_front(chain.writable_pieces());
            let filled = rest.min(chain.writable_length());
            rest -= filled;
            self.queue.add_used(chain, filled)?;
        }
        host.counts.received += 1;
        host.counts.received_bytes += (length - HEADER) as u64;
        Ok(())
    }
}

impl FromGuest {
    pub(super) fn new(memory: &Arc<GuestMemory>, queue: Queue) -> Self {
        Self { memory: Arc::clone(memory), queue, frame: IoVecs::new(memory), waiting: None }
    }

    /// Sends no frame any more.
    pub(super) fn stop(&mut self) {
        self.queue = Queue::disabled(1);
        self.waiting = None;
    }

    pub(super) fn run(&mut self, host: &mut Host) -> Result<Stop, NetFailure> {
        if !self.queue.is_enabled() {
            return Ok(Stop::Driver);
        }
        for _ in 0..FRAMES_PER_TURN {
            let chain = match self.waiting.take() {
                Some(chain) => chain,
                None => match self.queue.pop()? {
                    Some(chain) => chain,
                    None if self.queue.enable_kicks()? => continue,
                    None => return Ok(Stop::Driver),
                },
            };
            let length = chain.readable_length() as usize;
            if host.gone || length <= HEADER || length > FRAME_MAX {
                host.counts.sent_dropped += 1;
                self.queue.add_used(chain, 0)?;
                continue;
            }
            self.frame.clear();
            self.frame.add_readable(chain.reader(&self.memory))?;
            match host.tap.send(&self.frame) {
                Outcome::Done(_) => {
                    host.counts.sent += 1;
                    host.counts.sent_bytes += (length - HEADER) as u64;
                }
                Outcome::Wait => {
                    self.waiting = Some(chain);
                    return Ok(Stop::Tap);
                }
                Outcome::Refused => host.counts.sent_dropped += 1,
                Outcome::Gone => {
                    host.gone = true;
                    host.counts.sent_dropped += 1;
                }
            }
            self.queue.add_used(chain, 0)?;
        }
        Ok(Stop::Turn)
    }
}
