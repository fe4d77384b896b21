//! Guest memory over the life of a VM: where its pages are, which were written, and how snapshots and forks get them.
//!
//! ```text
//!   Own       a memfd, mapped shared: its data is the memory            ── freeze() ──► Base
//!   Base      a frozen file, mapped private: the file's data, and on top the pages that were written since
//!   Nothing   no file (memory that KSM may merge): only the pages that were written since
//! ```
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
use crate::image::{Images, SettleError};
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
    /// Kernel and initramfs cannot be copied into it.
    #[error(transparent)]
    Images(#[from] SettleError),
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
    Own(Arc<File>),
    Base(Base),
    Nothing,
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
    /// Pages of the VM's own on top of its origin, when that is not a file of its own.
    own: Pages,
    tracked: bool,
    /// The last snapshot and what was written since.
    snapshot: Option<Id>,
    since: Pages,
}

impl Ram {
    /// Memory of a VM that boots. `file` is what it is mapped from; none means that nothing is.
    pub fn new(memory: &GuestMemory, file: Option<Arc<File>>, options: MemoryConfig) -> Self {
        let tracked = options.track_writes || file.is_none();
        let origin = file.map_or(Origin::Nothing, Origin::Own);
        Self::with(memory, origin, options, tracked)
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
        let bytes = match &self.origin {
            Origin::Own(own) => {
                let data = sparse::data(own, size).map_err(RamError::Write)?;
                let mut pages = Pages::new(size / 4096);
                data.into_iter().chain(self.images.extents()).for_each(|extent| pages.add(extent));
                sparse::write(&self.memory, pages.runs(), file)
            }
            Origin::Base(base) => {
                let mut pages = self.own.clone();
                let data = sparse::data(&base.memory, size).map_err(RamError::Write)?;
                data.into_iter().for_each(|extent| pages.add(extent));
                sparse::write(&self.memory, pages.runs(), file)
            }
            Origin::Nothing => sparse::write(&self.memory, self.own.runs(), file),
        }
        .map_err(RamError::Write)?;
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
        match &self.origin {
            Origin::Own(file) => {
                let memory = file.clone();
                self.images.settle(&self.memory)?;
                self.freeze_own(vm, &memory)?;
                self.origin = Origin::Base(Base { state: state.clone(), memory: memory.clone(), id });
                let written = Written { parent: None, extents: vec![], bytes: 0 };
                Ok(Frozen { written, memory, base: None })
            }
            origin => {
                let base = if let Origin::Base(base) = origin { Some(base.clone()) } else { None };
                let file = memory_file(sparse::size(&self.memory), false).map_err(MemoryError::Create)?;
                let extents = if base.is_some() { self.own.extents() } else { vec![] };
                let bytes = if base.is_some() {
                    sparse::write(&self.memory, extents.iter().copied(), &file)
                } else {
                    sparse::write(&self.memory, self.own.runs(), &file)
                };
                let bytes = bytes.map_err(RamError::Write)?;
                super::seal(&file).map_err(RamError::Write)?;
                let written = Written { parent: base.as_ref().map(|base| base.id), extents, bytes };
                Ok(Frozen { written, memory: Arc::new(file), base })
            }
        }
    }

    /// The file stays as it is from now on: the VM keeps its writes for itself.
    fn freeze_own(&mut self, vm: &Vm, file: &File) -> Result<(), RamError> {
        let freeze = |call| move |source| RamError::Freeze { call, source };
        let mut offset: libc::off_t = 0;
        for region in self.memory.iter() {
            let (address, length) = (region.get_mmap().as_ptr(), region.get_mmap().size());
            // SAFETY: the range is the whole mapping of the region, which is replaced by another mapping with the same
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
                return Err(freeze("mmap")(io::Error::last_os_error()));
            }
            offset += libc::off_t::try_from(length).unwrap_or(0);
        }
        advise(&self.memory, self.options);
        // SAFETY: an fcntl on a descriptor that we own, with an integer argument.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, F_SEAL_FUTURE_WRITE) } != 0 {
            return Err(freeze("seal")(io::Error::last_os_error()));
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

/// Nothing writes to the file any more, except mappings that exist; there are none.
const F_SEAL_FUTURE_WRITE: libc::c_int = 0x0010;

fn track(memory: &GuestMemory) {
    for region in memory.iter() {
        region.bitmap().map().track(usize::try_from(region.len()).unwrap_or(0));
    }
}
