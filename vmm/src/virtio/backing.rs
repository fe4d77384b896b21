//! What a block device stores its sectors in: a regular file or a block device, by descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use crate::ioctl;

/// Bytes of a sector: the unit of all addresses (virtio 1.3 section 5.2.4).
pub const SECTOR: u64 = 512;

// include/uapi/linux/fs.h: _IOR(0x12, 114, size_t), _IO(0x12, 104), _IO(0x12, 119).
const BLKGETSIZE64: libc::Ioctl = ioctl::number(0x8008_1272);
const BLKSSZGET: libc::Ioctl = ioctl::number(0x1268);
const BLKDISCARD: libc::Ioctl = ioctl::number(0x1277);

/// Why a descriptor cannot be the backing of a disk.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// Its kind, size or flags cannot be asked for.
    #[error("cannot find out {0}")]
    Ask(&'static str, #[source] io::Error),
    /// A directory, socket, terminal or the like.
    #[error("it is neither a regular file nor a block device")]
    Kind,
    /// Nothing in it.
    #[error("it is empty")]
    Empty,
    /// Not a whole number of sectors.
    #[error("its size of {0} bytes is not a multiple of {SECTOR}")]
    Partial(u64),
    /// More bytes than an offset can name.
    #[error("its size of {0} bytes is over 2^63 - 1")]
    TooLarge(u64),
    /// The descriptor cannot be read.
    #[error("it is not open for reading")]
    NotReadable,
    /// The disk is to be written and the descriptor cannot be.
    #[error("it is not open for writing, and the disk is not read-only")]
    NotWritable,
    /// `O_APPEND`: writes would go to the end, wherever they belong.
    #[error("it is open for appending")]
    Append,
}

/// An open backing and what it can do.
#[derive(Debug)]
pub struct Backing {
    file: File,
    /// Size in bytes, a multiple of [`SECTOR`].
    size: u64,
    block_size: u32,
    is_device: bool,
    can_discard: bool,
}

impl Backing {
    /// Takes `fd` as backing. Probes on writable backings change nothing that is stored.
    ///
    /// # Errors
    /// What makes it unusable.
    pub fn new(fd: OwnedFd, read_only: bool) -> Result<Self, BackingError> {
        let file = File::from(fd);
        let metadata = file.metadata().map_err(|e| BackingError::Ask("what it is", e))?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.file_type().is_file() {
            return Err(BackingError::Kind);
        }
        check_flags(&file, read_only)?;
        let (size, block_size) = measure(&file, is_device)?;
        let mut backing = Self { file, size, block_size, is_device, can_discard: false };
        backing.can_discard = !read_only && backing.probe_discard();
        Ok(backing)
    }

    /// Looks at the size again.
    ///
    /// # Errors
    /// What is wrong with the new size; the old one stays.
    pub fn refresh(&mut self) -> Result<(), BackingError> {
        (self.size, _) = measure(&self.file, self.is_device)?;
        Ok(())
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.size / SECTOR
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether [`Self::discard`] does something.
    pub fn can_discard(&self) -> bool {
        self.can_discard
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The system's answer.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives back the space of a range of bytes. Its content is lost.
    ///
    /// # Errors
    /// The system's answer.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.is_device { self.discard_device(offset, length) } else { self.punch(offset, length) }
    }

    /// Makes a range of bytes read as zeroes. With `unmap` its space may be given back.
    ///
    /// # Errors
    /// The system's answer.
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let mut result = Err(io::ErrorKind::Unsupported.into());
        if unmap {
            result = self.punch(offset, length);
        }
        if is_unsupported(&result) {
            result = self.allocate(libc::FALLOC_FL_ZERO_RANGE, offset, length);
        }
        if is_unsupported(&result) {
            result = self.write_plain_zeroes(offset, length);
        }
        result
    }

    fn write_plain_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeroes = [0; 16 << 10];
        let (mut at, end) = (offset, offset.saturating_add(length));
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeroes.len());
            self.file.write_all_at(zeroes.get(..part).unwrap_or_default(), at)?;
            at += part as u64;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, length)
    }

    fn allocate(&self, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: the call takes no memory of ours.
        let result = unsafe {
            libc::fallocate(self.file.as_raw_fd(), mode | libc::FALLOC_FL_KEEP_SIZE, offset, length)
        };
        answer(result)
    }

    fn discard_device(&self, offset: u64, length: u64) -> io::Result<()> {
        let range = [offset, length];
        // SAFETY: BLKDISCARD reads two u64 from `range`, which lives until the call returns.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
        answer(result)
    }

    fn probe_discard(&self) -> bool {
        let result = if self.is_device {
            // The kernel first says whether it can discard and then finds that the offset is no multiple of 512.
            self.discard_device(1, SECTOR)
        } else {
            // Nothing is stored behind the end.
            self.punch(self.size, SECTOR)
        };
        match result {
            Ok(()) => true,
            Err(error) => self.is_device && error.kind() == io::ErrorKind::InvalidInput,
        }
    }
}

fn is_unsupported(result: &io::Result<()>) -> bool {
    matches!(result, Err(e) if e.kind() == io::ErrorKind::Unsupported || e.raw_os_error() == Some(libc::ENOSYS))
}

fn answer(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn check_flags(file: &File, read_only: bool) -> Result<(), BackingError> {
    // SAFETY: F_GETFL takes no argument and no memory of ours.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    answer(flags.min(0)).map_err(|e| BackingError::Ask("how it is open", e))?;
    let mode = flags & libc::O_ACCMODE;
    if mode == libc::O_WRONLY || flags & libc::O_PATH != 0 {
        return Err(BackingError::NotReadable);
    }
    if !read_only && mode != libc::O_RDWR {
        return Err(BackingError::NotWritable);
    }
    if !read_only && flags & libc::O_APPEND != 0 {
        return Err(BackingError::Append);
    }
    Ok(())
}

/// Size and logical block size in bytes.
fn measure(file: &File, is_device: bool) -> Result<(u64, u32), BackingError> {
    let (size, block_size) = if is_device {
        device_size(file)?
    } else {
        (file.metadata().map_err(|e| BackingError::Ask("its size", e))?.size(), 512)
    };
    if size == 0 {
        return Err(BackingError::Empty);
    }
    if !size.is_multiple_of(SECTOR) {
        return Err(BackingError::Partial(size));
    }
    if i64::try_from(size).is_err() {
        return Err(BackingError::TooLarge(size));
    }
    Ok((size, block_size))
}

fn device_size(file: &File) -> Result<(u64, u32), BackingError> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64, to `size`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    answer(result).map_err(|e| BackingError::Ask("its size", e))?;
    let mut block_size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int, to `block_size`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut block_size) };
    answer(result).map_err(|e| BackingError::Ask("its block size", e))?;
    Ok((size, u32::try_from(block_size).unwrap_or(512)))
}
