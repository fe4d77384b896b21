//! Guest memory over the life of a VM: where its pages are, which were written, and how snapshots and forks get them.
//!
//! ```text
//!   Anonymous  no file: the pages that are there are the memory            ── freeze(), by copying ──►  Base
//!   Own        a memfd, mapped shared: its data is the memory              ── freeze(), in place ────►  Base
//!   Base       a frozen file, mapped private: the file's data, and on top the pages that were written since
//! ```
//!
//! Anonymous memory is what a VM boots with: the kernel gives it huge pages, of which a guest needs far fewer than of a
//! memfd's small ones before it is up. The first fork copies what is there to a file, once. A VM that is made to be forked
//! (`memory.fork_ready`) has that file from the start.
//!
//! On top of a base each first write of a page costs a fault anyway, so there writes are always tracked: it is known
//! exactly which pages are the VM's own.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use blixard_vmm_api::snapshot::MemoryConfig;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::dirty::PAGE;
use super::pages::{Extent, Pages};
use super::{MemoryError, advise, memory_file, sparse};
use crate::image::Images;
use crate::kvm::{KvmError, Vm};
use crate::snapshot::Id;
use crate::virtio::device::GuestMemory;

/// Why memory cannot be written or frozen.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Nobody noted what was written.
    #[error("writes are not tracked (memory.track_writes), so there is no diff")]
    NotTracked,
    /// There is nothing that a diff could be based on.
    #[error("there was no snapshot yet that a diff could be based on")]
    NoSnapshot,
    /// The kernel does not tell what was written.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The memory file cannot be written.
    #[error("write the memory file")]
    Write(#[source] io::Error),
    /// The kernel does not tell which pages are there.
    #[error("find the pages of guest memory")]
    Resident(#[source] io::Error),
    /// Memory cannot be frozen.
    #[error("freeze guest memory: {call}")]
    Freeze {
        /// The call.
        call: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no file for it.
    #[error(transparent)]
    File(#[from] MemoryError),
}

/// A frozen file that memory is based on.
#[derive(Clone)]
pub struct Base {
    /// The state file that belongs to it.
    pub state: Arc<File>,
    /// The memory file.
    pub memory: Arc<File>,
    /// Its id.
    pub id: Id,
}

enum Origin {
    Anonymous,
    Own(Arc<File>),
    Base(Base),
}

/// What was written to a memory file.
pub struct Written {
    /// What the file is based on; the pages are all that is not zero when there is nothing.
    pub parent: Option<Id>,
    /// Pages of a diff.
    pub extents: Vec<Extent>,
    /// Bytes.
    pub bytes: u64,
}

/// Memory frozen for children.
pub struct Frozen {
    /// What was written for it, if anything.
    pub written: Written,
    /// The file with it; none when that is the frozen memory itself.
    pub memory: Arc<File>,
    /// What that is based on.
    pub base: Option<Base>,
}

/// Guest memory.
pub struct Ram {
    memory: GuestMemory,
    options: MemoryConfig,
    origin: Origin,
    /// What is mapped from other files, on top of memory of its own.
    images: Images,
    /// Pages of the VM's own on top of its base, if it has one.
    own: Pages,
    tracked: bool,
    /// The last snapshot and what was written since.
    snapshot: Option<Id>,
    since: Pages,
}

impl Ram {
    /// Memory of a VM that boots. `file` is what it is mapped from; without one it is anonymous.
    pub fn new(memory: &GuestMemory, file: Option<Arc<File>>, options: MemoryConfig) -> Self {
        let origin = file.map_or(Origin::Anonymous, Origin::Own);
        Self::with(memory, origin, options, options.track_writes)
    }

    /// Memory that was mapped private from `base`, with pages `own` changed since; all that is snapshot `id`.
    pub fn restored(memory: &GuestMemory, base: Base, own: Pages, id: Id, options: MemoryConfig) -> Self {
        let mut ram = Self::with(memory, Origin::Base(base), options, true);
        ram.own = own;
        ram.snapshot = Some(id);
        ram
    }

    fn with(memory: &GuestMemory, origin: Origin, options: MemoryConfig, tracked: bool) -> Self {
        let pages = if tracked { sparse::size(memory) / 4096 } else { 0 };
        if tracked {
            track(memory);
        }
        Self {
            memory: memory.clone(),
            options,
            origin,
            images: Images::default(),
            own: Pages::new(pages),
            tracked,
            snapshot: None,
            since: Pages::new(pages),
        }
    }

    /// Remembers what was mapped into memory of its own.
    pub fn keep(&mut self, images: Images) {
        self.images = images;
    }

    /// Whether KVM has to log writes.
    pub fn is_tracked(&self) -> bool {
        self.tracked
    }

    /// The memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Notes what was written until now.
    fn collect(&mut self, vm: &Vm) -> Result<(), RamError> {
        if !self.tracked {
            return Ok(());
        }
        let mut fresh = Pages::new(sparse::size(&self.memory) / 4096);
        let mut first = 0;
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let words = fresh.words_from(first);
            let log = vm.take_log(slot, usize::try_from(region.len()).unwrap_or(0))?;
            words.iter_mut().zip(log).for_each(|(word, log)| *word = log);
            region.bitmap().map().take_into(words);
            first += region.len() / 4096;
        }
        self.own.add_all(&fresh);
        self.since.add_all(&fresh);
        Ok(())
    }

    /// Writes all memory that is not zero to `file`, which becomes the memory file of snapshot `id`.
    ///
    /// # Errors
    /// The kernel does not tell what was written, or the file cannot be written.
    pub fn write_full(&mut self, vm: &Vm, file: &File, id: Id) -> Result<Written, RamError> {
        self.collect(vm)?;
        let size = self.empty(file)?;
        let mut pages = match &self.origin {
            Origin::Anonymous => sparse::resident(&self.memory).map_err(RamError::Resident)?,
            Origin::Own(_) => Pages::new(size / 4096),
            Origin::Base(_) => self.own.clone(),
        };
        if let Origin::Own(file) | Origin::Base(Base { memory: file, .. }) = &self.origin {
            sparse::data(file, size).map_err(RamError::Write)?.into_iter().for_each(|e| pages.add(e));
        }
        self.images.extents().for_each(|extent| pages.add(extent));
        let bytes = sparse::write(&self.memory, pages.runs(), file).map_err(RamError::Write)?;
        self.begin_interval(id);
        Ok(Written { parent: None, extents: vec![], bytes })
    }

    /// Writes the pages that changed since the last snapshot to `file`, which becomes the memory file of snapshot `id`.
    ///
    /// # Errors
    /// There is nothing to be based on, or as [`Self::write_full`].
    pub fn write_diff(&mut self, vm: &Vm, file: &File, id: Id) -> Result<Written, RamError> {
        if !self.tracked {
            return Err(RamError::NotTracked);
        }
        let parent = self.snapshot.ok_or(RamError::NoSnapshot)?;
        self.collect(vm)?;
        self.empty(file)?;
        let extents = self.since.extents();
        let bytes = sparse::write(&self.memory, extents.iter().copied(), file).map_err(RamError::Write)?;
        self.begin_interval(id);
        Ok(Written { parent: Some(parent), extents, bytes })
    }

    fn begin_interval(&mut self, id: Id) {
        self.snapshot = Some(id);
        self.since.clear();
    }

    fn empty(&self, file: &File) -> Result<u64, RamError> {
        let size = sparse::size(&self.memory);
        file.set_len(0).and_then(|()| file.set_len(size)).map_err(RamError::Write)?;
        Ok(size)
    }

    /// Makes memory something that children can share. `state` is the state file of the fork, which is named `id`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn freeze(&mut self, vm: &Vm, state: &Arc<File>, id: Id) -> Result<Frozen, RamError> {
        self.collect(vm)?;
        if let Origin::Base(base) = &self.origin {
            let base = base.clone();
            let file = self.new_file()?;
            let extents = self.own.extents();
            let bytes =
                sparse::write(&self.memory, extents.iter().copied(), &file).map_err(RamError::Write)?;
            super::seal(&file).map_err(RamError::Write)?;
            let written = Written { parent: Some(base.id), extents, bytes };
            return Ok(Frozen { written, memory: file, base: Some(base) });
        }
        let (memory, bytes) = if let Origin::Own(file) = &self.origin {
            let file = file.clone();
            self.map_frozen(&file, 0, u64::MAX)?;
            (file, 0)
        } else {
            let file = self.new_file()?;
            let bytes = self.move_to(&file)?;
            self.images = Images::default();
            (file, bytes)
        };
        self.freeze_own(vm, &memory)?;
        self.origin = Origin::Base(Base { state: state.clone(), memory: memory.clone(), id });
        let written = Written { parent: None, extents: vec![], bytes };
        Ok(Frozen { written, memory, base: None })
    }

    fn new_file(&self) -> Result<Arc<File>, RamError> {
        let file = memory_file(sparse::size(&self.memory), false).map_err(MemoryError::Create)?;
        Ok(Arc::new(file))
    }

    /// Copies anonymous memory to `file` and maps that in its place, piece by piece: at no time is there more than a piece of
    /// it twice, so that a limit on memory that was enough before still is. Answers the number of bytes copied.
    ///
    /// When a copy fails, some of memory is moved and some is not. All of it has its content, and is found again as before:
    /// the pages of a file in memory are there as anonymous ones are. So the VM can go on, and the next fork begins anew.
    fn move_to(&mut self, file: &File) -> Result<u64, RamError> {
        let mut pages = sparse::resident(&self.memory).map_err(RamError::Resident)?;
        self.images.extents().for_each(|extent| pages.add(extent));
        let (mut bytes, mut at, size) = (0, 0, sparse::size(&self.memory));
        while at < size {
            let end = size.min(at + MOVE_PIECE);
            let copied = sparse::write(&self.memory, pages.within(at / 4096, end / 4096), file);
            bytes += copied.map_err(RamError::Write)?;
            self.map_frozen(file, at, end)?;
            at = end;
        }
        Ok(bytes)
    }

    /// Maps bytes `from` to `to` of the file in the place of guest memory that has the same content: what is written from then
    /// on stays out of the file.
    fn map_frozen(&self, file: &File, from: u64, to: u64) -> Result<(), RamError> {
        let freeze = |source| RamError::Freeze { call: "mmap", source };
        let mut start = 0;
        for region in self.memory.iter() {
            let end = start + region.len();
            let (first, behind) = (from.clamp(start, end), to.clamp(start, end));
            let number = |bytes: u64| usize::try_from(bytes).map_err(|e| freeze(io::Error::other(e)));
            let (skip, length) = (number(first - start)?, number(behind - first)?);
            start = end;
            if length == 0 {
                continue;
            }
            let offset = libc::off_t::try_from(first).map_err(|e| freeze(io::Error::other(e)))?;
            // SAFETY: `skip` is below the length of the region, as `length` is not 0.
            let address = unsafe { region.get_mmap().as_ptr().add(skip) };
            // SAFETY: the range is a part of the mapping of the region, which is replaced by another mapping with the same
            // content and protection; everything that uses it by address stays right. KVM is told by the kernel.
            let mapped = unsafe {
                libc::mmap(
                    address.cast(),
                    length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    file.as_raw_fd(),
                    offset,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(freeze(io::Error::last_os_error()));
            }
        }
        Ok(())
    }

    /// The file, which is mapped, stays as it is from now on: the VM keeps its writes for itself.
    fn freeze_own(&mut self, vm: &Vm, file: &File) -> Result<(), RamError> {
        advise(&self.memory, self.options);
        // SAFETY: an fcntl on a descriptor that we own, with an integer argument.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, F_SEAL_FUTURE_WRITE) } != 0 {
            let source = io::Error::last_os_error();
            return Err(RamError::Freeze { call: "seal", source });
        }
        let pages = sparse::size(&self.memory) / u64::try_from(PAGE).unwrap_or(1);
        self.own = Pages::new(pages);
        if !self.tracked {
            self.tracked = true;
            self.since = Pages::new(pages);
            // Nobody knows what was written between the last snapshot and now.
            self.snapshot = None;
            track(&self.memory);
            vm.set_memory(&self.memory, true)?;
        }
        Ok(())
    }
}

/// Bytes that are moved to a file at a time, a multiple of the largest page of anonymous memory.
const MOVE_PIECE: u64 = 8 << 20;
/// Nothing writes to the file any more, except mappings that exist; there are none.
const F_SEAL_FUTURE_WRITE: libc::c_int = 0x0010;

fn track(memory: &GuestMemory) {
    for region in memory.iter() {
        region.bitmap().map().track(usize::try_from(region.len()).unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::layout::MIB;

    #[test]
    fn memory_that_could_not_be_moved_whole_is_still_there_and_can_be_moved_later() {
        let memory = crate::memory::create(24).unwrap();
        let mut ram = Ram::new(&memory, None, MemoryConfig::default());
        let places = [0, 4 * MIB, 8 * MIB - 8, 8 * MIB, 17 * MIB, 24 * MIB - 8].map(GuestAddress);
        let check = || places.map(|at| memory.read_obj::<u64>(at).unwrap()) == places.map(|at| at.0 + 1);
        places.iter().for_each(|at| memory.write_obj(at.0 + 1, *at).unwrap());
        // It cannot grow, so that only the first piece has room.
        let small = memory_file(8 * MIB, false).unwrap();
        let error = ram.move_to(&small).unwrap_err();
        assert!(matches!(error, RamError::Write(_)), "{error}");
        drop(small);
        assert!(check());
        let file = memory_file(24 * MIB, false).unwrap();
        assert_eq!(ram.move_to(&file).unwrap(), 6 * 4096);
        assert!(check());
        // What is written now stays out of the file.
        memory.write_obj(7u64, places[4]).unwrap();
        use std::os::unix::fs::FileExt;
        for at in places {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, at.0).unwrap();
            assert_eq!(u64::from_le_bytes(word), at.0 + 1);
        }
    }
}
