//! Answers page faults of guest memory from a memory file, and notes which pages were used: `userfaultfd(2)`.
//!
//! A thread of its own, and only for a VM that asks for it. A page that is zero in the file becomes the shared zero page. A
//! page that the VM gave back (balloon) comes back as zeros.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use blixard_vmm_api::ExitReason;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::dirty::{DirtyMap, PAGE};
use super::pages::Pages;
use super::sparse;
use crate::mailbox::{Mailbox, Message};
use crate::sandbox;
use crate::virtio::device::GuestMemory;

/// Stack of the thread in bytes.
const STACK: usize = 64 << 10;

/// Requests and structures of `linux/userfaultfd.h`.
mod uapi {
    use crate::ioctl;

    pub const NEW: libc::Ioctl = ioctl::number(0xAA00);
    pub const API: libc::Ioctl = ioctl::number(0xC018_AA3F);
    pub const REGISTER: libc::Ioctl = ioctl::number(0xC020_AA00);
    pub const COPY: libc::Ioctl = ioctl::number(0xC028_AA03);
    pub const ZEROPAGE: libc::Ioctl = ioctl::number(0xC020_AA04);
    pub const WAKE: libc::Ioctl = ioctl::number(0x8010_AA02);
    pub const VERSION: u64 = 0xAA;
    pub const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
    pub const REGISTER_MODE_MISSING: u64 = 1;
    pub const EVENT_PAGEFAULT: u64 = 0x12;
    pub const EVENT_REMOVE: u64 = 0x15;
}

/// Why faults cannot be answered.
#[derive(Debug, thiserror::Error)]
#[error("userfaultfd: {call}")]
pub struct UserfaultError {
    /// What was tried.
    call: &'static str,
    /// The system's answer.
    #[source]
    source: io::Error,
}

fn failed(call: &'static str) -> impl Fn(io::Error) -> UserfaultError {
    move |source| UserfaultError { call, source }
}

/// A part of memory: where it is mapped, and where it is in the file.
struct Part {
    address: u64,
    length: u64,
    offset: u64,
}

/// Memory whose faults are answered by nobody yet.
pub struct Userfault {
    fd: OwnedFd,
    parts: Vec<Part>,
    file: Arc<File>,
    used: Arc<DirtyMap>,
    /// Pages that the VM gave back.
    removed: Pages,
    buffer: Box<[u8; PAGE]>,
}

/// An ioctl whose argument is an array of 64-bit fields.
fn call(fd: RawFd, request: libc::Ioctl, fields: &mut [u64]) -> io::Result<()> {
    // SAFETY: each request used here has a structure of 64-bit fields, and each caller passes as many as it has. Addresses in
    // them lie in guest memory or in the buffer of this thread.
    match unsafe { libc::ioctl(fd, request, fields.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A descriptor for faults of this process: from `/dev/userfaultfd` if given, else by the system call.
fn open(device: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = match device {
        // SAFETY: the request takes flags and no pointer.
        Some(device) => unsafe { libc::ioctl(device.as_raw_fd(), uapi::NEW, flags) },
        None => {
            // SAFETY: the call takes flags and no pointer.
            let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
            RawFd::try_from(fd).unwrap_or(-1)
        }
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Userfault {
    /// Will answer faults of `memory`, which is mapped without a file, from `file`.
    ///
    /// # Errors
    /// The kernel has no such thing for us.
    pub fn new(
        device: Option<&OwnedFd>,
        memory: &GuestMemory,
        file: &Arc<File>,
    ) -> Result<Self, UserfaultError> {
        let fd = open(device).map_err(failed("open"))?;
        let mut api = [uapi::VERSION, uapi::FEATURE_EVENT_REMOVE, 0];
        call(fd.as_raw_fd(), uapi::API, &mut api).map_err(failed("UFFDIO_API"))?;
        let mut parts = vec![];
        let mut offset = 0;
        for region in memory.iter() {
            let address = region.get_mmap().as_ptr().addr() as u64;
            let length = region.len();
            let mut fields = [address, length, uapi::REGISTER_MODE_MISSING, 0];
            call(fd.as_raw_fd(), uapi::REGISTER, &mut fields).map_err(failed("UFFDIO_REGISTER"))?;
            parts.push(Part { address, length, offset });
            offset += length;
        }
        let used = Arc::new(DirtyMap::default());
        used.track(usize::try_from(offset).unwrap_or(0));
        let removed = Pages::new(sparse::size(memory) / 4096);
        Ok(Self { fd, parts, file: file.clone(), used, removed, buffer: Box::new([0; PAGE]) })
    }

    /// Notes the used pages here.
    pub fn used(&self) -> Arc<DirtyMap> {
        self.used.clone()
    }

    /// Starts the thread. When it cannot go on the VM ends.
    ///
    /// # Errors
    /// There is no thread.
    pub fn start(mut self, mailbox: Arc<Mailbox>, log_only: bool) -> Result<(), UserfaultError> {
        let body = move || {
            let entered = sandbox::enter_pager(log_only).map_err(|error| crate::chain(&error));
            let end = entered.and_then(|()| self.serve().map_err(|error| crate::chain(&error)));
            if let Err(detail) = end {
                mailbox.post(Message::Exit(ExitReason::HostProblem { detail }));
            }
        };
        let thread = thread::Builder::new().name("pager".into()).stack_size(STACK);
        thread.spawn(body).map(drop).map_err(failed("thread"))
    }

    fn serve(&mut self) -> Result<(), UserfaultError> {
        let mut waiting: Vec<u64> = vec![];
        loop {
            let mut ready = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // What could not be answered while memory was being changed is tried again soon.
            let timeout = if waiting.is_empty() { -1 } else { 1 };
            // SAFETY: the pointer is to one entry.
            if unsafe { libc::poll(&raw mut ready, 1, timeout) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(failed("poll")(error));
                }
            }
            while let Some(message) = self.message()? {
                let [kind, first, second, _] = message;
                match kind & 0xFF {
                    // Flags, address.
                    uapi::EVENT_PAGEFAULT => waiting.push(second),
                    // Start, end.
                    uapi::EVENT_REMOVE => self.remove(first, second),
                    _ => {}
                }
            }
            for address in std::mem::take(&mut waiting) {
                if !self.answer(address)? {
                    waiting.push(address);
                }
            }
        }
    }

    /// The next message, as its four 64-bit fields.
    fn message(&self) -> Result<Option<[u64; 4]>, UserfaultError> {
        let mut fields = [0u64; 4];
        // SAFETY: the buffer has the size of a message.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), fields.as_mut_ptr().cast(), 32) };
        match (got, io::Error::last_os_error()) {
            (32, _) => Ok(Some(fields)),
            (-1, error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            (-1, error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            (_, error) => Err(failed("read")(error)),
        }
    }

    fn offset(&self, address: u64) -> Option<u64> {
        let part = self.parts.iter().find(|p| (p.address..p.address + p.length).contains(&address))?;
        Some(part.offset + (address - part.address))
    }

    fn remove(&mut self, start: u64, end: u64) {
        if let Some(offset) = self.offset(start) {
            let pages = (end.saturating_sub(start)) / 4096;
            let page = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
            self.removed.add((page(offset / 4096), page(pages)));
        }
    }

    /// Fills the page of `address` in; false when memory is just being changed.
    fn answer(&mut self, address: u64) -> Result<bool, UserfaultError> {
        let address = address & !(4096 - 1);
        let Some(offset) = self.offset(address) else { return Ok(true) };
        if let Ok(at) = usize::try_from(offset) {
            self.used.mark_dirty(at, 1);
        }
        if self.removed.contains(offset / 4096) {
            self.buffer.fill(0);
        } else {
            self.file
                .read_exact_at(self.buffer.as_mut_slice(), offset)
                .map_err(failed("read the memory file"))?;
        }
        let result = if self.buffer.iter().all(|byte| *byte == 0) {
            call(self.fd.as_raw_fd(), uapi::ZEROPAGE, &mut [address, 4096, 0, 0])
        } else {
            let source = self.buffer.as_ptr().addr() as u64;
            call(self.fd.as_raw_fd(), uapi::COPY, &mut [address, source, 4096, 0, 0])
        };
        match result.map_err(|error| (error.raw_os_error(), error)) {
            Ok(()) => Ok(true),
            Err((Some(libc::EAGAIN), _)) => Ok(false),
            // Another fault brought it in meanwhile: whoever still waits is woken.
            Err((Some(libc::EEXIST), _)) => {
                let woken = call(self.fd.as_raw_fd(), uapi::WAKE, &mut [address, 4096]);
                woken.map(|()| true).map_err(failed("UFFDIO_WAKE"))
            }
            Err((_, error)) => Err(failed("UFFDIO_COPY")(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::layout::MIB;

    #[test]
    fn pages_come_from_the_file_when_they_are_used_and_are_noted() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(16 * MIB).unwrap();
        file.write_all_at(&[7; 10], 5 * 4096 + 3).unwrap();
        let memory = crate::memory::map_empty(16 * MIB).unwrap();
        let device = File::options().read(true).write(true).open("/dev/userfaultfd").map(OwnedFd::from).ok();
        let Ok(pager) = Userfault::new(device.as_ref(), &memory, &file) else {
            use std::io::Write;
            let _ = writeln!(io::stderr(), "skipped: this host lets nobody use userfaultfd");
            return;
        };
        let used = pager.used();
        // The filter stays with the thread, which ends with the process.
        pager.start(Arc::new(Mailbox::new().unwrap()), false).unwrap();
        let mut bytes = [0; 12];
        memory.read_slice(&mut bytes, GuestAddress(5 * 4096 + 2)).unwrap();
        assert_eq!(bytes, [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(9 * 4096)).unwrap(), 0);
        memory.write_obj(1u8, GuestAddress(11 * 4096)).unwrap();
        let mut words = [0; 64];
        used.take_into(&mut words);
        assert_eq!(words[0], 1 << 5 | 1 << 9 | 1 << 11);
    }
}
