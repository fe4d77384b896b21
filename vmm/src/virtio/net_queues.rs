//! The two directions of a network card: frames to the guest, frames from the guest. [`super::net`] says when they run.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::chain::{Chain, ChainError};
use super::device::GuestMemory;
use super::iovec::{self, IoVecs};
use super::net_tap::{FRAME_MAX, HEADER, Outcome, Tap};
use super::queue::{Queue, QueueError};
use super::rate::Limiter;
use crate::stats::Histogram;

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
    #[error("queues of the tap")]
    Attach(#[source] io::Error),
    #[error("limit")]
    Limit(#[source] io::Error),
    #[error("vhost-net found a queue broken")]
    Kernel,
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
    /// Interrupts for either direction.
    pub(super) interrupts: u64,
    pub(super) turns: u64,
    /// Frames to the guest in one turn.
    pub(super) batches: Histogram,
}

impl Counts {
    /// A turn passed so many frames to the guest.
    pub(super) fn batch(&mut self, frames: u64) {
        self.turns += 1;
        if frames > 0 {
            self.batches.record(frames);
        }
    }
}

/// Frames to the guest.
pub(super) struct ToGuest {
    memory: Arc<GuestMemory>,
    pub(super) queue: Queue,
    mergeable: bool,
    /// Chains taken and not yet filled, and their pieces in the same order.
    held: VecDeque<Chain>,
    room: IoVecs,
    /// A frame that the tap gave us and the driver does not have yet.
    waiting: Option<Waiting>,
}

/// A frame on its way to the driver.
#[derive(Clone, Copy)]
struct Waiting {
    /// Its bytes with the header.
    length: usize,
    /// It is in the first of the held chains, else in [`Host::frame`].
    straight: bool,
    /// It has its tokens.
    admitted: bool,
}

/// Frames from the guest.
pub(super) struct FromGuest {
    memory: Arc<GuestMemory>,
    pub(super) queue: Queue,
    frame: IoVecs,
    /// A frame that the tap had no room for, or that has to wait for tokens.
    waiting: Option<Chain>,
    /// It has its tokens.
    admitted: bool,
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
    /// It has used up its rate.
    Limit,
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
        self.waiting = None;
    }

    pub(super) fn run(&mut self, host: &mut Host, limit: &mut Option<Limiter>) -> Result<Stop, NetFailure> {
        if !self.queue.is_enabled() || host.gone {
            return Ok(Stop::Driver);
        }
        for _ in 0..FRAMES_PER_TURN {
            if self.waiting.is_none()
                && let Some(stop) = self.receive(host)?
            {
                return Ok(stop);
            }
            if let Some(stop) = self.deliver(host, limit)? {
                return Ok(stop);
            }
        }
        Ok(Stop::Turn)
    }

    /// Takes the next frame from the tap.
    fn receive(&mut self, host: &mut Host) -> Result<Option<Stop>, NetFailure> {
        self.hold(FRAME_MAX)?;
        // Without mergeable buffers a frame has to fit in one chain.
        let room = if self.mergeable { self.room.left() } else { self.first_length() };
        if room == 0 {
            return Ok(Some(Stop::Driver));
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
            Outcome::Done(length) => self.waiting = Some(Waiting { length, straight, admitted: false }),
            Outcome::Refused => host.counts.received_dropped += 1,
            Outcome::Wait => return Ok(Some(Stop::Tap)),
            Outcome::Gone => {
                host.gone = true;
                return Ok(Some(Stop::Driver));
            }
        }
        Ok(None)
    }

    /// Gives the waiting frame, if there is one, to the driver.
    fn deliver(&mut self, host: &mut Host, limit: &mut Option<Limiter>) -> Result<Option<Stop>, NetFailure> {
        let Some(frame) = &mut self.waiting else { return Ok(None) };
        frame.admitted = frame.admitted || admit(limit, frame.length)?;
        if !frame.admitted {
            return Ok(Some(Stop::Limit));
        }
        let Waiting { length, straight, .. } = *frame;
        if straight {
            self.give_back(length, host)?;
        } else if !self.scatter(length, host)? {
            return Ok(Some(Stop::Driver));
        }
        self.waiting = None;
        Ok(None)
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
            // It was marked when it was taken; but it may have been held over a snapshot, which has taken the marks.
            iovec::mark_filled(&self.memory, chain.writer(&self.memory).split(filled as usize)?)?;
            self.queue.add_used(chain, filled)?;
        }
        host.counts.received += 1;
        host.counts.received_bytes += (length - HEADER) as u64;
        Ok(())
    }
}

impl FromGuest {
    pub(super) fn new(memory: &Arc<GuestMemory>, queue: Queue) -> Self {
        Self { memory: Arc::clone(memory), queue, frame: IoVecs::new(memory), waiting: None, admitted: false }
    }

    /// Sends no frame any more.
    pub(super) fn stop(&mut self) {
        self.queue = Queue::disabled(1);
        self.waiting = None;
    }

    pub(super) fn run(&mut self, host: &mut Host, limit: &mut Option<Limiter>) -> Result<Stop, NetFailure> {
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
                self.give_back(chain)?;
                continue;
            }
            self.admitted = self.admitted || admit(limit, length)?;
            if !self.admitted {
                self.waiting = Some(chain);
                return Ok(Stop::Limit);
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
            self.give_back(chain)?;
        }
        Ok(Stop::Turn)
    }

    fn give_back(&mut self, chain: Chain) -> Result<(), NetFailure> {
        self.admitted = false;
        Ok(self.queue.add_used(chain, 0)?)
    }
}

/// Whether a frame of `length` bytes with its header may pass now.
fn admit(limit: &mut Option<Limiter>, length: usize) -> Result<bool, NetFailure> {
    let Some(limit) = limit else { return Ok(true) };
    limit.admit((length - HEADER.min(length)) as u64, 1).map_err(NetFailure::Limit)
}
