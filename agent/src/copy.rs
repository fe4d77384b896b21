//! Copies of files that cost as little as the file system allows: shared extents, else only the parts that hold data.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use sha2::{Digest as _, Sha256};

/// Bytes that are read or copied at once.
const CHUNK: usize = 1 << 20;

/// Shares the extents of `from` with `to` (`ioctl_ficlone(2)`); false when the file system cannot, and `to` is as it was.
pub fn reflink(from: &impl AsFd, to: &impl AsFd) -> bool {
    let (source, target) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: FICLONE takes a descriptor by value and touches no memory of ours; both are open while they are borrowed.
    let answer = unsafe { libc::ioctl(target, libc::FICLONE, source) };
    answer == 0
}

/// Makes `to`, an empty file, a copy of `from` of `length` bytes. Holes stay holes.
///
/// # Errors
/// The system's answer; `to` is then of no use.
pub fn sparse(from: &File, to: &File, length: u64) -> io::Result<()> {
    if reflink(from, to) {
        return Ok(());
    }
    to.set_len(length)?;
    let end = i64::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut at = 0;
    while at < end {
        let data = match lseek64(from, at, Whence::SeekData) {
            Ok(data) => data,
            // No data behind this point.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let hole = lseek64(from, data, Whence::SeekHole)?;
        at = hole.min(end);
        copy_range(from, to, data, at)?;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, begin: i64, end: i64) -> io::Result<()> {
    let (mut input, mut output) = (begin, begin);
    while input < end {
        let left = usize::try_from(end - input).unwrap_or(usize::MAX).min(CHUNK);
        match nix::fcntl::copy_file_range(from, Some(&mut input), to, Some(&mut output), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // Not between these file systems: by hand.
            Err(Errno::EXDEV | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
                let mut buffer = vec![0; left];
                let at = u64::try_from(input).map_err(io::Error::other)?;
                from.read_exact_at(&mut buffer, at)?;
                to.write_all_at(&buffer, at)?;
                let done = i64::try_from(left).map_err(io::Error::other)?;
                input += done;
                output += done;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Copies `length` bytes of `from` to the empty file `to` and answers the SHA-256 of what is in `to`, or `None` when `from`
/// is shorter. Another process may write to `from` meanwhile: what is hashed is what was stored, never a second reading.
///
/// # Errors
/// The system's answer; `to` is then of no use.
pub fn hashed(from: &File, to: &mut File, length: u64) -> io::Result<Option<[u8; 32]>> {
    let shared = reflink(from, to);
    if !shared {
        to.set_len(length)?;
    } else if to.metadata()?.len() != length {
        return Ok(None);
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < length {
        let want = usize::try_from(length - at).unwrap_or(CHUNK).min(CHUNK);
        let Some(part) = buffer.get_mut(..want) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let source = if shared { &*to } else { from };
        let read = match source.read_at(part, at) {
            Ok(0) => return Ok(None),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let part = part.get(..read).unwrap_or_default();
        hash.update(part);
        // Zeros are there already.
        if !shared && part.iter().any(|b| *b != 0) {
            to.seek(SeekFrom::Start(at))?;
            to.write_all(part)?;
        }
        at = at.saturating_add(u64::try_from(read).unwrap_or(0));
    }
    Ok(Some(hash.finalize().into()))
}
