//! Block device (virtio 1.3 section 5.2): requests parsed, executed, answered.
//!
//! ```text
//!  queue ─pop─► parse ─► refused ───────────────────────► status, used
//!                  └───► id, discard, zeroes (at once) ─► status, used
//!                  └───► read, write, flush ─► engine ──► status, used    a chain stays in flight until the engine is done
//! ```
//!
//! A request over the rate limit is held, with all behind it, until the limiter's timer says so. There is one queue: one
//! thread serves it, so more of them would bring nothing.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use blixard_vmm_api::rate::RateLimit;
use vmm_sys_util::epoll::EventSet;

use super::backing::{Backing, BackingError};
use super::block_counts::{Begun, Counts, Kind};
use super::block_engine::{Engine, Finished, Operation};
use super::block_request::{
    DISCARD_SECTORS_MAX, ID_LENGTH, Limits, NoRequest, RANGES_MAX, Range, Request, Status, ZERO_SECTORS_MAX,
    parse,
};
use super::chain::{Chain, ChainError};
use super::device::{
    Activation, ConfigSpace, Device, DeviceKind, DeviceRequest, GuestMemory, Interrupt, Watch,
};
use super::failure::Failure;
use super::iovec::IoVecs;
use super::queue::{Queue, QueueError};
use super::rate::Limiter;
use super::turn::Turn;
use crate::snapshot::codec::{Invalid, Reader as StateReader, Writer as StateWriter};
use crate::stats::Samples;

/// Requests begun before other devices get their turn.
const REQUESTS_PER_TURN: usize = 64;
/// Bytes transferred at once before other devices get their turn.
const BYTES_PER_TURN: u64 = 4 << 20;
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
const TURN: u64 = 0;
const ENGINE: u64 = 1;
const LIMIT: u64 = 2;

/// Bits of virtio 1.3 section 5.2.3.
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Why a disk cannot be.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial number does not fit.
    #[error("the serial number {0:?} is not 1 to {ID_LENGTH} bytes of printable ASCII")]
    Id(String),
    /// The descriptor is no disk.
    #[error("the backing of disk {0:?} is unusable")]
    Backing(String, #[source] BackingError),
    /// The events of the device cannot be made.
    #[error("events of disk {0:?}")]
    Event(String, #[source] io::Error),
}

/// Why a disk stopped until its next reset.
#[derive(Debug, thiserror::Error)]
enum BlockFailure {
    #[error("request queue")]
    Queue(#[from] QueueError),
    #[error("request")]
    NoRequest(#[from] NoRequest),
    #[error("request buffer")]
    Chain(#[from] ChainError),
    #[error("events of the device")]
    Event(#[source] io::Error),
    #[error("I/O engine")]
    Engine(#[source] io::Error),
    #[error("timer of the rate limit")]
    Limit(#[source] io::Error),
}

/// The device.
pub struct Block {
    id: [u8; ID_LENGTH],
    limits: Limits,
    block_size: u32,
    config: ConfigSpace,
    engine: Engine,
    limiter: Option<Limiter>,
    /// The engine's descriptor while it is watched.
    watched: Option<RawFd>,
    turn: Turn,
    active: Option<Active>,
    paused: bool,
    failure: Failure,
    counts: Counts,
}

struct Active {
    memory: Arc<GuestMemory>,
    queue: Queue,
    interrupt: Arc<dyn Interrupt>,
    /// The newest request, when the rate limit does not admit it yet.
    held: Option<Chain>,
    /// Requests with the engine, by the head of their chain.
    in_flight: Vec<Option<InFlight>>,
    spare: Vec<IoVecs>,
    /// Kept for its allocation.
    done: Vec<Finished>,
    /// The driver knows no FLUSH: it takes a finished write for durable (virtio 1.3 section 5.2.6.2).
    durable: bool,
}

struct InFlight {
    chain: Chain,
    /// Bytes filled in before the status when it succeeds.
    filled: u32,
    begun: Begun,
}

impl Block {
    /// A disk on `backing`, a regular file or a block device, whose serial number is `id`.
    ///
    /// # Errors
    /// What is wrong with the serial number or the backing.
    pub fn new(id: &str, backing: OwnedFd, read_only: bool, limit: &RateLimit) -> Result<Self, BlockError> {
        Self::with_engine(id, backing, read_only, limit, Engine::new)
    }

    /// The same with a chosen engine.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_engine(
        id: &str,
        backing: OwnedFd,
        read_only: bool,
        limit: &RateLimit,
        engine: fn(Backing) -> Engine,
    ) -> Result<Self, BlockError> {
        let fits = (1..=ID_LENGTH).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
        if !fits {
            return Err(BlockError::Id(id.to_owned()));
        }
        let mut serial = [0; ID_LENGTH];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let backing = Backing::new(backing, read_only).map_err(|e| BlockError::Backing(id.to_owned(), e))?;
        let limits = Limits { sectors: backing.sectors(), read_only, discard: backing.can_discard() };
        let block_size = backing.block_size();
        let event = |e| BlockError::Event(id.to_owned(), e);
        Ok(Self {
            id: serial,
            limits,
            block_size,
            config: ConfigSpace::new(config_bytes(limits, block_size)),
            engine: engine(backing),
            limiter: Limiter::new(limit).map_err(event)?,
            watched: None,
            turn: Turn::new().map_err(event)?,
            active: None,
            paused: false,
            failure: Failure::default(),
            counts: Counts::default(),
        })
    }

    fn watch(&mut self, watch: &mut dyn Watch) -> io::Result<()> {
        self.turn.watch(watch, TURN)?;
        let timer = self.limiter.as_ref().map_or(Ok(()), |limiter| limiter.watch(watch, LIMIT));
        let engine = match self.engine.event_fd() {
            Some(fd) if timer.is_ok() => watch.add(fd, EventSet::IN.bits(), ENGINE).map(|()| Some(fd)),
            _ => Ok(None),
        };
        match (timer, engine) {
            (Ok(()), Ok(fd)) => {
                self.watched = fd;
                Ok(())
            }
            (Ok(()), Err(error)) => {
                self.unwatch_events(watch);
                Err(error)
            }
            (Err(error), _) => {
                self.turn.unwatch(watch);
                Err(error)
            }
        }
    }

    fn unwatch_events(&mut self, watch: &mut dyn Watch) {
        self.turn.unwatch(watch);
        if let Some(limiter) = &mut self.limiter {
            limiter.unwatch(watch);
        }
    }

    fn unwatch_engine(&mut self, watch: &mut dyn Watch) {
        if let Some(fd) = self.watched.take() {
            watch.remove(fd);
        }
    }

    /// The disk has another size or another backing: so the driver is told.
    fn changed(&mut self) {
        self.limits.sectors = self.engine.backing().sectors();
        self.limits.discard = self.engine.backing().can_discard();
        self.config.set(config_bytes(self.limits, self.block_size));
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    fn swap(&mut self, backing: OwnedFd, watch: &mut dyn Watch) -> Result<(), String> {
        let problem = |error: &dyn std::error::Error| crate::chain(error);
        let backing = Backing::new(backing, self.limits.read_only).map_err(|e| problem(&e))?;
        if backing.block_size() > self.block_size {
            let (new, old) = (backing.block_size(), self.block_size);
            return Err(format!("its blocks have {new} bytes, the guest was told {old}"));
        }
        self.act(Active::drain, watch);
        self.engine.swap(backing).map_err(|e| problem(&e))?;
        self.changed();
        self.run(watch);
        Ok(())
    }

    fn run(&mut self, watch: &mut dyn Watch) {
        if !self.paused {
            self.act(Active::serve, watch);
        }
    }

    fn act(
        &mut self,
        act: fn(&mut Active, &mut Work<'_>) -> Result<bool, BlockFailure>,
        watch: &mut dyn Watch,
    ) {
        let Some(active) = self.active.as_mut().filter(|active| active.queue.is_enabled()) else { return };
        let mut work = Work {
            id: &self.id,
            limits: self.limits,
            engine: &mut self.engine,
            limiter: self.limiter.as_mut(),
            counts: &mut self.counts,
        };
        match act(active, &mut work) {
            Ok(true) => self.turn.ask(),
            Ok(false) => {}
            Err(error) => {
                active.queue = Queue::disabled(0);
                active.held = None;
                self.failure.note(&error, &*active.interrupt);
                self.engine.drain(&mut Vec::new());
                self.unwatch_engine(watch);
            }
        }
    }
}

/// What serving needs besides the driver's side.
struct Work<'a> {
    id: &'a [u8; ID_LENGTH],
    limits: Limits,
    engine: &'a mut Engine,
    limiter: Option<&'a mut Limiter>,
    counts: &'a mut Counts,
}

impl Active {
    /// Begins requests and answers finished ones; true when there are more than fit in one turn.
    fn serve(&mut self, work: &mut Work<'_>) -> Result<bool, BlockFailure> {
        let more = self.begin_all(work)?;
        let mut done = std::mem::take(&mut self.done);
        let again = work.engine.poll(&mut done).map_err(BlockFailure::Engine)?;
        let room = more && !work.engine.is_full();
        self.finish_all(&mut done, work)?;
        self.done = done;
        // A full engine wakes us when it has room.
        Ok(room || again)
    }

    fn begin_all(&mut self, work: &mut Work<'_>) -> Result<bool, BlockFailure> {
        work.counts.read_clock();
        let before = work.counts.read_bytes + work.counts.write_bytes;
        for _ in 0..REQUESTS_PER_TURN {
            if work.engine.is_full() {
                break;
            }
            let chain = match self.held.take() {
                Some(chain) => chain,
                None => match self.queue.pop()? {
                    Some(chain) => chain,
                    None if self.queue.enable_kicks()? => continue,
                    None => return Ok(false),
                },
            };
            self.begin(chain, work)?;
            if self.held.is_some() {
                // The limiter's timer wakes us.
                return Ok(false);
            }
            // What is done already need not wait for the rest.
            self.publish()?;
            if work.counts.read_bytes + work.counts.write_bytes - before >= BYTES_PER_TURN {
                break;
            }
        }
        Ok(true)
    }

    /// Waits for all that is in flight.
    fn drain(&mut self, work: &mut Work<'_>) -> Result<bool, BlockFailure> {
        let mut done = Vec::new();
        work.engine.drain(&mut done);
        self.finish_all(&mut done, work)?;
        Ok(false)
    }

    fn finish_all(&mut self, done: &mut Vec<Finished>, work: &mut Work<'_>) -> Result<(), BlockFailure> {
        if !done.is_empty() {
            work.counts.read_clock();
        }
        for finished in done.drain(..) {
            self.finish(finished, work.counts)?;
        }
        self.publish()
    }

    fn publish(&mut self) -> Result<(), BlockFailure> {
        if self.queue.publish()? {
            self.interrupt.used(self.queue.index());
        }
        Ok(())
    }

    fn begin(&mut self, chain: Chain, work: &mut Work<'_>) -> Result<(), BlockFailure> {
        let request = parse(&chain, &self.memory, work.limits)?;
        if let Some(limiter) = &mut work.limiter {
            // A held request is read anew when its time has come: then that is what counts and what is done.
            let (bytes, operations) = request.as_ref().map_or((0, 1), Request::cost);
            if !limiter.admit(bytes, operations).map_err(BlockFailure::Limit)? {
                self.held = Some(chain);
                return Ok(());
            }
        }
        let counts = &mut *work.counts;
        let request = match request {
            Ok(request) => request,
            Err(status) => return self.answer(chain, 0, status, counts),
        };
        let mut buffers = self.spare.pop().unwrap_or_else(|| IoVecs::new(&self.memory));
        buffers.clear();
        let (operation, filled, kind) = match request {
            Request::Id => {
                let mut writer = chain.writer(&self.memory);
                writer.write(work.id)?;
                return self.answer(chain, ID_LENGTH, Status::Ok, counts);
            }
            Request::Discard(ranges) => {
                let begun = counts.begin(Kind::Discard);
                let discard = |r: &Range| work.engine.backing().discard(r.offset, r.length);
                let status = each(&ranges, discard);
                counts.read_clock();
                counts.end(begun);
                return self.answer(chain, 0, status, counts);
            }
            Request::WriteZeroes(ranges) => {
                let begun = counts.begin(Kind::WriteZeroes);
                let zero = |r: &Range| work.engine.backing().write_zeroes(r.offset, r.length, r.unmap);
                let mut status = each(&ranges, zero);
                if self.durable && status == Status::Ok && work.engine.backing().flush().is_err() {
                    status = Status::IoError;
                }
                counts.read_clock();
                counts.end(begun);
                return self.answer(chain, 0, status, counts);
            }
            Request::Read(offset, length) => {
                counts.read_bytes += length as u64;
                buffers.add_writable(chain.writer(&self.memory).split(length)?)?;
                (Operation::Read(offset), length, Kind::Read)
            }
            Request::Write(offset, length) => {
                counts.write_bytes += length as u64;
                let mut reader = chain.reader(&self.memory);
                reader.split(reader.left() - length)?;
                buffers.add_readable(reader)?;
                (Operation::Write { offset, durable: self.durable }, 0, Kind::Write)
            }
            Request::Flush => (Operation::Flush, 0, Kind::Flush),
        };
        let id = chain.head();
        let Some(slot) = self.in_flight.get_mut(usize::from(id)) else { return Ok(()) };
        let begun = counts.begin(kind);
        *slot = Some(InFlight { chain, filled: u32::try_from(filled).unwrap_or(0), begun });
        match work.engine.start(id, operation, buffers) {
            Some(finished) => {
                counts.read_clock();
                self.finish(finished, counts)
            }
            None => Ok(()),
        }
    }

    fn finish(&mut self, finished: Finished, counts: &mut Counts) -> Result<(), BlockFailure> {
        let Finished { id, buffers, result } = finished;
        self.spare.push(buffers);
        let request = self.in_flight.get_mut(usize::from(id)).and_then(Option::take);
        let Some(InFlight { chain, filled, begun }) = request else { return Ok(()) };
        counts.end(begun);
        match result {
            Ok(()) => self.answer(chain, filled as usize, Status::Ok, counts),
            Err(_) => self.answer(chain, 0, Status::IoError, counts),
        }
    }

    /// Writes the status and gives the chain back. `filled` bytes of the data were filled in.
    fn answer(
        &mut self,
        chain: Chain,
        filled: usize,
        status: Status,
        counts: &mut Counts,
    ) -> Result<(), BlockFailure> {
        if status != Status::Ok {
            counts.errors += 1;
        }
        let mut writer = chain.writer(&self.memory);
        let space = writer.left().saturating_sub(1);
        writer.split(space)?;
        writer.write(&[status as u8])?;
        // The length told covers bytes that were written without a gap from the first one on (virtio 1.3 section 2.7.8.2).
        let written = if filled == space { filled + 1 } else { filled };
        self.queue.add_used(chain, u32::try_from(written).unwrap_or(u32::MAX))?;
        Ok(())
    }
}

fn each(ranges: &[Range], act: impl Fn(&Range) -> io::Result<()>) -> Status {
    let mut wanted = ranges.iter().filter(|range| range.length > 0);
    if wanted.all(|range| act(range).is_ok()) { Status::Ok } else { Status::IoError }
}

/// `struct virtio_blk_config` (virtio 1.3 section 5.2.4).
fn config_bytes(limits: Limits, block_size: u32) -> Vec<u8> {
    let (discard_max, zero_max) = match limits {
        Limits { read_only: true, .. } => (0, 0),
        Limits { discard: false, .. } => (0, ZERO_SECTORS_MAX),
        _ => (DISCARD_SECTORS_MAX, ZERO_SECTORS_MAX),
    };
    let alignment = block_size / 512;
    let mut bytes = Vec::with_capacity(60);
    bytes.extend(limits.sectors.to_le_bytes());
    bytes.extend(0u32.to_le_bytes()); // size_max: not offered
    bytes.extend(u32::from(QUEUE_SIZE - 2).to_le_bytes()); // seg_max: header and status take one descriptor each
    bytes.extend([0; 4]); // geometry: not offered
    bytes.extend(block_size.to_le_bytes());
    bytes.extend([0; 8]); // topology: not offered
    bytes.extend([0, 0]); // writeback: not offered
    bytes.extend(1u16.to_le_bytes()); // num_queues
    bytes.extend(discard_max.to_le_bytes());
    bytes.extend(RANGES_MAX.to_le_bytes());
    bytes.extend(alignment.to_le_bytes());
    bytes.extend(zero_max.to_le_bytes());
    bytes.extend(RANGES_MAX.to_le_bytes());
    bytes.extend([u8::from(limits.discard), 0, 0, 0]); // write_zeroes_may_unmap
    bytes
}

impl Device for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let mut features = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
        if self.limits.read_only {
            features |= feature::RO;
        } else {
            features |= feature::WRITE_ZEROES;
        }
        if self.limits.discard {
            features |= feature::DISCARD;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn activate(&mut self, activation: Activation, watch: &mut dyn Watch) {
        let Activation { memory, features, queues, interrupt } = activation;
        let queue = queues.into_iter().next().unwrap_or_else(|| Queue::disabled(0));
        if let Err(error) = self.watch(watch) {
            self.failure.note(&BlockFailure::Event(error), &*interrupt);
            return;
        }
        self.active = Some(Active {
            memory: Arc::new(memory),
            in_flight: (0..queue.size()).map(|_| None).collect(),
            queue,
            interrupt,
            held: None,
            spare: Vec::new(),
            done: Vec::new(),
            durable: features & feature::FLUSH == 0,
        });
        self.run(watch);
    }

    fn on_kick(&mut self, _index: u16, watch: &mut dyn Watch) {
        self.run(watch);
    }

    fn on_event(&mut self, token: u64, _events: u32, watch: &mut dyn Watch) {
        match token {
            TURN => self.turn.take(),
            LIMIT => self.limiter.iter_mut().for_each(Limiter::take_timer),
            _ => {}
        }
        self.run(watch);
    }

    fn deactivate(&mut self, watch: &mut dyn Watch) {
        // Nothing may be written for requests of this driver into the memory of the next one.
        self.engine.drain(&mut Vec::new());
        if self.active.take().is_some() {
            self.unwatch_events(watch);
        }
        self.unwatch_engine(watch);
        self.failure.clear();
    }

    fn on_pause(&mut self, paused: bool, watch: &mut dyn Watch) {
        self.paused = paused;
        if paused {
            // A VM that stands still has no I/O under way: its memory and its disk belong to the same instant.
            self.act(Active::drain, watch);
        }
        self.run(watch);
    }

    fn on_request(&mut self, request: DeviceRequest, watch: &mut dyn Watch) -> Result<(), String> {
        match request {
            DeviceRequest::Resize => {
                self.engine.refresh().map_err(|error| crate::chain(&error))?;
                self.changed();
                Ok(())
            }
            DeviceRequest::Swap(backing) => self.swap(backing, watch),
            _ => Err("a disk does nothing of the kind".into()),
        }
    }

    fn save(&self, to: &mut StateWriter) {
        Limiter::save(self.limiter.as_ref(), to);
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<(), Invalid> {
        Limiter::restore(self.limiter.as_mut(), from)
    }

    fn failure(&self) -> Option<String> {
        self.failure.reason()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counts;
        vec![
            ("reads", c.reads),
            ("read_bytes", c.read_bytes),
            ("writes", c.writes),
            ("write_bytes", c.write_bytes),
            ("flushes", c.flushes),
            ("discards", c.discards),
            ("write_zeroes", c.write_zeroes),
            ("errors", c.errors),
            ("in_flight", self.engine.in_flight() as u64),
            ("io_uring", u64::from(self.engine.event_fd().is_some())),
            ("limited", self.limiter.as_ref().map_or(0, Limiter::waits)),
            ("failures", self.failure.count()),
        ]
    }

    fn samples(&self, samples: &mut Samples) {
        samples.counters(None, &self.counters());
        self.counts.spread(samples);
    }
}
