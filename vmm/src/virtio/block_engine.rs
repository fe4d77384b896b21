//! Read, write and flush on a backing: many at once by io_uring, or one after the other with `preadv` and `pwritev` where
//! the kernel has no io_uring for us (`kernel.io_uring_disabled`, a seccomp filter, an old kernel).
//!
//! What a turn of the device starts is given to the kernel by one call, which also tells what is done already.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use super::backing::{Backing, BackingError};
use super::iovec::IoVecs;

/// Most operations in flight: one ring of this size takes 8 KiB of submissions and 4 KiB of completions.
const ENTRIES: u16 = 128;
/// Most kernel threads for operations that would block: bounded ones (files), unbounded ones.
const WORKERS: [u32; 2] = [4, 2];

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffers from an offset in bytes on.
    Read(u64),
    /// Store the buffers from an offset in bytes on; durable when `durable`.
    Write {
        /// Where to.
        offset: u64,
        /// Whether it has to be on stable storage when it is done.
        durable: bool,
    },
    /// Make all finished writes durable.
    Flush,
}

impl Operation {
    /// The same for what is left after `count` bytes.
    fn behind(self, count: u64) -> Self {
        match self {
            Self::Read(offset) => Self::Read(offset.saturating_add(count)),
            Self::Write { offset, durable } => Self::Write { offset: offset.saturating_add(count), durable },
            Self::Flush => Self::Flush,
        }
    }
}

/// A finished operation.
pub struct Finished {
    /// The name it was started under.
    pub id: u16,
    /// Its buffers, for reuse.
    pub buffers: IoVecs,
    /// How it went. Success means that all bytes were transferred.
    pub result: io::Result<()>,
}

/// Does operations on a backing.
pub struct Engine {
    backing: Backing,
    ring: Option<Ring>,
}

impl Engine {
    /// An engine on `backing`, with io_uring if the kernel lets us.
    pub fn new(backing: Backing) -> Self {
        let ring = Ring::new(&backing).ok();
        Self { backing, ring }
    }

    /// An engine without io_uring.
    pub fn plain(backing: Backing) -> Self {
        Self { backing, ring: None }
    }

    /// The backing.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Looks at the size of the backing again.
    ///
    /// # Errors
    /// What is wrong with the new size; the old one stays.
    pub fn refresh(&mut self) -> Result<(), BackingError> {
        self.backing.refresh()
    }

    /// Goes on with another backing. Only legal while nothing is in flight.
    ///
    /// # Errors
    /// The kernel refuses; then the old backing stays.
    pub fn swap(&mut self, backing: Backing) -> io::Result<()> {
        if self.in_flight() > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        if let Some(ring) = &mut self.ring {
            ring.io.submitter().register_files_update(0, &[backing.fd().as_raw_fd()])?;
        }
        self.backing = backing;
        Ok(())
    }

    /// To be watched for input when there is one: then [`Self::poll`] has something. The plain engine has none.
    pub fn event_fd(&self) -> Option<RawFd> {
        self.ring.as_ref().map(|ring| ring.io.as_raw_fd())
    }

    /// No operation can be started before one is finished.
    pub fn is_full(&self) -> bool {
        self.in_flight() >= ENTRIES.into()
    }

    /// Operations started and not finished.
    pub fn in_flight(&self) -> usize {
        self.ring.as_ref().map_or(0, |ring| ring.in_flight)
    }

    /// Starts an operation under the name `id`, which no operation in flight has. Done at once it comes back finished;
    /// otherwise the next [`Self::poll`] gives it to the kernel.
    pub fn start(&mut self, id: u16, operation: Operation, mut buffers: IoVecs) -> Option<Finished> {
        if let Some(ring) = &mut self.ring {
            return ring.start(Slot { id, operation, buffers });
        }
        let result = transfer(&self.backing, operation, &mut buffers);
        Some(Finished { id, buffers, result })
    }

    /// Gives what was started to the kernel and adds what is finished to `done`. True when the kernel could not take all
    /// and has to be asked again.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn poll(&mut self, done: &mut Vec<Finished>) -> io::Result<bool> {
        match &mut self.ring {
            Some(ring) => ring.poll(&self.backing, done),
            None => Ok(false),
        }
    }

    /// Waits until nothing is in flight and adds all that finished to `done`.
    pub fn drain(&mut self, done: &mut Vec<Finished>) {
        if let Some(ring) = &mut self.ring
            && ring.drain(&self.backing, done).is_err()
        {
            // It cannot be known any more what the kernel still does, so it keeps ring and memory for ever.
            std::mem::forget(self.ring.take());
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The kernel fills buffers until an operation is finished; they must not go before.
        self.drain(&mut Vec::new());
    }
}

struct Slot {
    id: u16,
    operation: Operation,
    buffers: IoVecs,
}

struct Ring {
    io: IoUring,
    /// What the kernel works on, by id: the buffers live here until it says that it is done.
    slots: Vec<Option<Slot>>,
    in_flight: usize,
    completed: Vec<(u64, i32)>,
}

/// `IORING_REGISTER_FILES_UPDATE`.
const REGISTER_FILES_UPDATE: u8 = 6;
/// The only descriptor of the ring, by its place in the ring's own table.
const FILE: types::Fixed = types::Fixed(0);

impl Ring {
    fn new(backing: &Backing) -> io::Result<Self> {
        // Completions of a thread that waits in the kernel anyway need not interrupt it (from Linux 5.19).
        let cooperative =
            IoUring::builder().setup_r_disabled().setup_coop_taskrun().dontfork().build(ENTRIES.into());
        let io = cooperative
            .or_else(|_| IoUring::builder().setup_r_disabled().dontfork().build(ENTRIES.into()))?;
        let submitter = io.submitter();
        submitter.register_files(&[backing.fd().as_raw_fd()])?;
        // Kernels before 5.15 have no such bound; there the limit of processes is one.
        let _unbounded = submitter.register_iowq_max_workers(&mut WORKERS.clone());
        // From now on the ring can read, write and flush this one descriptor, whatever is written into it; and another
        // one can be put into its place.
        submitter.register_restrictions(&mut [
            Restriction::register_op(REGISTER_FILES_UPDATE),
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self { io, slots: Vec::new(), in_flight: 0, completed: Vec::new() })
    }

    fn start(&mut self, slot: Slot) -> Option<Finished> {
        let index = usize::from(slot.id);
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, || None);
        }
        let Some(place) = self.slots.get_mut(index).filter(|place| place.is_none()) else {
            return Some(slot.end(Err(io::ErrorKind::AlreadyExists.into())));
        };
        let slot = place.insert(slot);
        let entry = entry(slot);
        // SAFETY: the entry points to the list of pieces of `slot.buffers` and these to guest memory that it keeps mapped.
        // The slot stays as it is in `slots` until the completion of its id was reaped, and `Engine` waits for that before
        // it goes. (The list is on the heap: it stays where it is when `slots` grows.)
        if unsafe { self.io.submission().push(&entry) }.is_err() {
            let slot = place.take()?;
            return Some(slot.end(Err(io::ErrorKind::ResourceBusy.into())));
        }
        self.in_flight += 1;
        None
    }

    fn poll(&mut self, backing: &Backing, done: &mut Vec<Finished>) -> io::Result<bool> {
        loop {
            let waiting = self.io.submission().len();
            let again = match if waiting > 0 { self.io.submit() } else { Ok(0) } {
                Ok(_) => false,
                Err(error) => is_passing(&error).then_some(true).ok_or(error)?,
            };
            // A transfer that was cut short is started again for the rest.
            if self.reap(backing, done) == 0 {
                return Ok(again);
            }
        }
    }

    fn drain(&mut self, backing: &Backing, done: &mut Vec<Finished>) -> io::Result<()> {
        while self.in_flight > 0 {
            match self.io.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
            self.reap(backing, done);
        }
        Ok(())
    }

    /// Takes completions; how many operations were started again for the rest of their bytes.
    fn reap(&mut self, backing: &Backing, done: &mut Vec<Finished>) -> usize {
        let mut completed = std::mem::take(&mut self.completed);
        completed.extend(self.io.completion().map(|entry| (entry.user_data(), entry.result())));
        let mut restarted = 0;
        for (id, result) in completed.drain(..) {
            let place = usize::try_from(id).ok().and_then(|index| self.slots.get_mut(index));
            let Some(slot) = place.and_then(Option::take) else { continue };
            self.in_flight -= 1;
            let finished = match slot.advance(backing, result) {
                Ok(rest) => {
                    restarted += 1;
                    self.start(rest)
                }
                Err(finished) => Some(finished),
            };
            done.extend(finished);
        }
        self.completed = completed;
        restarted
    }
}

impl Slot {
    fn end(self, result: io::Result<()>) -> Finished {
        Finished { id: self.id, buffers: self.buffers, result }
    }

    /// What to start for the rest after the kernel's `result`, or how it ended.
    fn advance(mut self, backing: &Backing, result: i32) -> Result<Self, Finished> {
        match usize::try_from(result) {
            Ok(0) if self.buffers.left() > 0 => Err(self.end(Err(io::ErrorKind::UnexpectedEof.into()))),
            Ok(count) => {
                self.buffers.advance(count);
                self.operation = self.operation.behind(count as u64);
                if self.buffers.left() > 0 { Ok(self) } else { Err(self.end(Ok(()))) }
            }
            Err(_) => match -result {
                libc::EINTR => Ok(self),
                // A descriptor that was opened with O_NONBLOCK: the ring does not wait for it.
                libc::EAGAIN => {
                    let result = transfer(backing, self.operation, &mut self.buffers);
                    Err(self.end(result))
                }
                error => Err(self.end(Err(io::Error::from_raw_os_error(error)))),
            },
        }
    }
}

/// The kernel is short of something for the moment.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

fn entry(slot: &Slot) -> squeue::Entry {
    let (pieces, count) = slot.buffers.raw();
    // One piece, as most small requests have, spares the kernel a look at the list.
    let single = slot.buffers.single();
    match (slot.operation, single) {
        (Operation::Read(offset), Some((address, length))) => {
            opcode::Read::new(FILE, address, length).offset(offset).build()
        }
        (Operation::Write { offset, durable }, Some((address, length))) => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(FILE, address, length).offset(offset).rw_flags(flags).build()
        }
        (Operation::Read(offset), None) => opcode::Readv::new(FILE, pieces, count).offset(offset).build(),
        (Operation::Write { offset, durable }, None) => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(FILE, pieces, count).offset(offset).rw_flags(flags).build()
        }
        (Operation::Flush, _) => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
    }
    .user_data(slot.id.into())
}

fn transfer(backing: &Backing, operation: Operation, buffers: &mut IoVecs) -> io::Result<()> {
    let fd = backing.fd();
    match operation {
        Operation::Read(offset) => all(offset, buffers, |b, at| b.read_from_at(fd, at)),
        Operation::Write { offset, durable } => {
            all(offset, buffers, |b, at| b.write_to_at(fd, at))?;
            if durable { backing.flush() } else { Ok(()) }
        }
        Operation::Flush => backing.flush(),
    }
}

/// Repeats a transfer until nothing is left.
fn all(
    mut offset: u64,
    buffers: &mut IoVecs,
    transfer: impl Fn(&IoVecs, i64) -> io::Result<usize>,
) -> io::Result<()> {
    while buffers.left() > 0 {
        let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        match transfer(buffers, at) {
            // The backing is shorter than it was.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buffers.advance(count);
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
