//! Persistent memory (virtio 1.3 section 5.19): a file in the guest's physical address space. The guest reads and writes it
//! without us; only that what it wrote has to be durable is a request.
//!
//! A read-only one is mapped shared and read-only: all VMs over one file use the same pages of the host, and no page of it
//! is in a guest's own memory when its file system maps it directly (DAX).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::backing::{Backing, BackingError};
use super::block_engine::{Engine, Finished, Operation};
use super::chain::{Chain, ChainError};
use super::device::{Activation, ConfigSpace, Device, DeviceKind, GuestMemory, Interrupt, Watch};
use super::failure::Failure;
use super::iovec::IoVecs;
use super::queue::{Queue, QueueError};
use super::turn::Turn;

/// Sizes are multiples of this: huge pages on both sides fit.
pub const ALIGNMENT: u64 = 2 << 20;
/// Requests begun before other devices get their turn.
const REQUESTS_PER_TURN: usize = 16;
const QUEUE_SIZES: [u16; 1] = [64];
const TURN: u64 = 0;
const ENGINE: u64 = 1;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = 1;

/// Why a persistent memory cannot be.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The descriptor is no backing.
    #[error("backing")]
    Backing(#[source] BackingError),
    /// A backing that is written to has an end that the guest could not use.
    #[error("its size of {0} bytes is not a multiple of 2 MiB")]
    Partial(u64),
    /// There is no address space for it.
    #[error("map {0} bytes")]
    Map(u64, #[source] io::Error),
    /// The events of the device cannot be made.
    #[error("events of the device")]
    Event(#[source] io::Error),
}

/// Why the device stopped until its next reset.
#[derive(Debug, thiserror::Error)]
enum PmemFailure {
    #[error("request queue")]
    Queue(#[from] QueueError),
    #[error("request")]
    Chain(#[from] ChainError),
    #[error("events of the device")]
    Event(#[source] io::Error),
    #[error("I/O engine")]
    Engine(#[source] io::Error),
}

/// A backing in the address space of this process, as long as its device lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Where it begins here.
    pub address: u64,
    /// Its length in bytes, a multiple of [`ALIGNMENT`]. What is behind the end of a read-only file reads as zeroes.
    pub length: u64,
    /// Nobody writes to it.
    pub read_only: bool,
}

/// The device.
pub struct Pmem {
    config: ConfigSpace,
    mapping: Mapping,
    /// Absent when there is nothing to flush.
    engine: Option<Engine>,
    /// The engine's descriptor while it is watched.
    watched: Option<RawFd>,
    turn: Turn,
    active: Option<Active>,
    paused: bool,
    failure: Failure,
    flushes: u64,
    errors: u64,
}

struct Active {
    memory: Arc<GuestMemory>,
    queue: Queue,
    interrupt: Arc<dyn Interrupt>,
    /// Requests with the engine, by the head of their chain.
    in_flight: Vec<Option<Chain>>,
}

impl Pmem {
    /// A device over `backing`, a regular file or a block device. It lies nowhere yet: see [`Self::place`].
    ///
    /// # Errors
    /// What is wrong with the backing.
    pub fn new(backing: OwnedFd, read_only: bool) -> Result<Self, PmemError> {
        Self::with_engine(backing, read_only, Engine::new)
    }

    /// The same with a chosen engine.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_engine(
        backing: OwnedFd,
        read_only: bool,
        engine: fn(Backing) -> Engine,
    ) -> Result<Self, PmemError> {
        let (mapping, engine) = if read_only {
            let file = File::from(backing);
            let size = readable_size(&file).map_err(PmemError::Backing)?;
            (map(&file, size, true)?, None)
        } else {
            let file = backing.try_clone().map_err(PmemError::Event)?;
            let backing = Backing::new(backing, false).map_err(PmemError::Backing)?;
            let size = backing.sectors() * 512;
            if !size.is_multiple_of(ALIGNMENT) {
                return Err(PmemError::Partial(size));
            }
            (map(&file.into(), size, false)?, Some(engine(backing)))
        };
        Ok(Self {
            config: ConfigSpace::new(vec![0; 16]),
            mapping,
            engine,
            watched: None,
            turn: Turn::new().map_err(PmemError::Event)?,
            active: None,
            paused: false,
            failure: Failure::default(),
            flushes: 0,
            errors: 0,
        })
    }

    /// Tells the driver where in guest physical memory it lies, and the caller what to put there.
    pub fn place(&mut self, start: u64) -> Mapping {
        self.config.set([start.to_le_bytes(), self.mapping.length.to_le_bytes()].concat());
        self.mapping
    }

    /// What is mapped.
    pub fn mapping(&self) -> Mapping {
        self.mapping
    }

    fn run(&mut self, watch: &mut dyn Watch) {
        if self.paused {
            return;
        }
        self.act(watch, |active, engine, counts| active.serve(engine, counts));
    }

    fn act(
        &mut self,
        watch: &mut dyn Watch,
        act: impl FnOnce(&mut Active, Option<&mut Engine>, (&mut u64, &mut u64)) -> Result<bool, PmemFailure>,
    ) {
        let Some(active) = self.active.as_mut().filter(|active| active.queue.is_enabled()) else { return };
        match act(active, self.engine.as_mut(), (&mut self.flushes, &mut self.errors)) {
            Ok(true) => self.turn.ask(),
            Ok(false) => {}
            Err(error) => {
                active.queue = Queue::disabled(0);
                self.failure.note(&error, &*active.interrupt);
                self.drain();
                self.unwatch_engine(watch);
            }
        }
    }

    fn drain(&mut self) {
        if let Some(engine) = &mut self.engine {
            engine.drain(&mut Vec::new());
        }
    }

    fn watch(&mut self, watch: &mut dyn Watch) -> io::Result<()> {
        self.turn.watch(watch, TURN)?;
        if let Some(fd) = self.engine.as_ref().and_then(Engine::event_fd) {
            watch.add(fd, EventSet::IN.bits(), ENGINE).inspect_err(|_| self.turn.unwatch(watch))?;
            self.watched = Some(fd);
        }
        Ok(())
    }

    fn unwatch_engine(&mut self, watch: &mut dyn Watch) {
        if let Some(fd) = self.watched.take() {
            watch.remove(fd);
        }
    }
}

impl Active {
    /// Begins requests and answers finished ones; true when there are more than fit in one turn.
    fn serve(
        &mut self,
        mut engine: Option<&mut Engine>,
        (flushes, errors): (&mut u64, &mut u64),
    ) -> Result<bool, PmemFailure> {
        let mut more = true;
        for _ in 0..REQUESTS_PER_TURN {
            if engine.as_ref().is_some_and(|engine| engine.is_full()) {
                // A full engine wakes us when it has room.
                more = false;
                break;
            }
            let Some(chain) = self.queue.pop()? else {
                if self.queue.enable_kicks()? {
                    continue;
                }
                more = false;
                break;
            };
            let kind = u32::from_le_bytes(chain.reader(&self.memory).read_array()?);
            match &mut engine {
                _ if kind != FLUSH => self.answer(chain, false, errors)?,
                // Nothing is ever written, so all of it is durable.
                None => self.answer(chain, true, errors)?,
                Some(engine) => {
                    *flushes += 1;
                    let id = chain.head();
                    if let Some(place) = self.in_flight.get_mut(usize::from(id)) {
                        *place = Some(chain);
                    }
                    let finished = engine.start(id, Operation::Flush, IoVecs::new(&self.memory));
                    finished.map_or(Ok(()), |finished| self.finish(&finished, errors))?;
                }
            }
        }
        let mut again = false;
        if let Some(engine) = engine {
            let mut done = Vec::new();
            again = engine.poll(&mut done).map_err(PmemFailure::Engine)?;
            for finished in done {
                self.finish(&finished, errors)?;
            }
        }
        self.publish()?;
        Ok(more || again)
    }

    /// Waits for all that is in flight.
    fn drain(&mut self, engine: &mut Engine, errors: &mut u64) -> Result<(), PmemFailure> {
        let mut done = Vec::new();
        engine.drain(&mut done);
        for finished in done {
            self.finish(&finished, errors)?;
        }
        self.publish()
    }

    fn finish(&mut self, finished: &Finished, errors: &mut u64) -> Result<(), PmemFailure> {
        let chain = self.in_flight.get_mut(usize::from(finished.id)).and_then(Option::take);
        chain.map_or(Ok(()), |chain| self.answer(chain, finished.result.is_ok(), errors))
    }

    fn answer(&mut self, chain: Chain, well: bool, errors: &mut u64) -> Result<(), PmemFailure> {
        *errors += u64::from(!well);
        let result = if well { DONE } else { FAILED };
        chain.writer(&self.memory).write(&result.to_le_bytes())?;
        self.queue.add_used(chain, 4)?;
        Ok(())
    }

    fn publish(&mut self) -> Result<(), PmemFailure> {
        if self.queue.publish()? {
            self.interrupt.used(self.queue.index());
        }
        Ok(())
    }
}

impl Device for Pmem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Pmem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn activate(&mut self, activation: Activation, watch: &mut dyn Watch) {
        let Activation { memory, queues, interrupt, .. } = activation;
        let queue = queues.into_iter().next().unwrap_or_else(|| Queue::disabled(0));
        if let Err(error) = self.watch(watch) {
            self.failure.note(&PmemFailure::Event(error), &*interrupt);
            return;
        }
        let in_flight = (0..queue.size()).map(|_| None).collect();
        self.active = Some(Active { memory: Arc::new(memory), queue, interrupt, in_flight });
        self.run(watch);
    }

    fn on_kick(&mut self, _index: u16, watch: &mut dyn Watch) {
        self.run(watch);
    }

    fn on_event(&mut self, token: u64, _events: u32, watch: &mut dyn Watch) {
        if token == TURN {
            self.turn.take();
        }
        self.run(watch);
    }

    fn deactivate(&mut self, watch: &mut dyn Watch) {
        self.drain();
        if self.active.take().is_some() {
            self.turn.unwatch(watch);
        }
        self.unwatch_engine(watch);
        self.failure.clear();
    }

    fn on_pause(&mut self, paused: bool, watch: &mut dyn Watch) {
        self.paused = paused;
        if paused {
            self.act(watch, |active, engine, (_, errors)| {
                engine.map_or(Ok(()), |engine| active.drain(engine, errors)).map(|()| false)
            });
        }
        self.run(watch);
    }

    fn failure(&self) -> Option<String> {
        self.failure.reason()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let in_flight = self.engine.as_ref().map_or(0, Engine::in_flight) as u64;
        vec![
            ("mapped_bytes", self.mapping.length),
            ("flushes", self.flushes),
            ("errors", self.errors),
            ("in_flight", in_flight),
            ("failures", self.failure.count()),
        ]
    }
}

impl Drop for Pmem {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut(usize::try_from(self.mapping.address).unwrap_or(0));
        unmap(start, usize::try_from(self.mapping.length).unwrap_or(0));
    }
}

fn unmap(start: *mut libc::c_void, length: usize) {
    if length > 0 {
        // SAFETY: the range was mapped by `map` and nobody here refers to its content; a VM that still has it as memory is
        // told by the kernel. It can only fail for ranges that are none.
        unsafe { libc::munmap(start, length) };
    }
}

/// Size in bytes of a backing that is only read. It may end anywhere.
fn readable_size(file: &File) -> Result<u64, BackingError> {
    let metadata = file.metadata().map_err(|e| BackingError::Ask("what it is", e))?;
    if metadata.file_type().is_block_device() {
        let copy = file.try_clone().map_err(|e| BackingError::Ask("its size", e))?;
        return Ok(Backing::new(copy.into(), true)?.sectors() * 512);
    }
    match metadata.len() {
        _ if !metadata.is_file() => Err(BackingError::Kind),
        0 => Err(BackingError::Empty),
        size if size > i64::MAX as u64 - ALIGNMENT => Err(BackingError::TooLarge(size)),
        size => Ok(size),
    }
}

/// Maps `size` bytes of `file` at an address that is a multiple of [`ALIGNMENT`].
fn map(file: &File, size: u64, read_only: bool) -> Result<Mapping, PmemError> {
    let failed = |error| PmemError::Map(size, error);
    let length = size.next_multiple_of(ALIGNMENT);
    let bytes = |n: u64| usize::try_from(n).map_err(|e| failed(io::Error::other(e)));
    let protection = if read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
    // First the address space, with room to align, then the file into it. What the file does not cover stays zeroes.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let room = bytes(length.saturating_add(ALIGNMENT))?;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_READ, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    let alignment = bytes(ALIGNMENT)?;
    let reserved = start;
    let start = start.map_addr(|address| address.next_multiple_of(alignment));
    let end = start.wrapping_byte_add(bytes(length)?);
    let before = start.addr() - reserved.addr();
    unmap(reserved, before);
    unmap(end, alignment - before);
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: the range lies in the mapping above, which nobody uses, and replaces it.
    let mapped = unsafe { libc::mmap(start, bytes(size)?, protection, flags, file.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    // An address is a number here; the lossless conversion has no safe name.
    Ok(Mapping { address: mapped.expose_provenance() as u64, length, read_only })
}
