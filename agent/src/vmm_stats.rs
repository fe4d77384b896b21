//! Asks a VMM for what it counts, on a control connection of its own.
//!
//! A VMM is hostile: the number of samples, the length of their names and the time it takes to answer are bounded, and what
//! does not keep to the form is left out.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use blixard_vmm_api::control::{FromVmm, MESSAGE_BYTES_MAX, Reply, Request};
use blixard_vmm_api::stats::{BUCKETS_MAX, Sample, Value};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};

use crate::launch::CONTROL_SOCKET;

/// Most samples of one VM.
const SAMPLES_MAX: usize = 4096;
/// Longest name of a device or of what was counted, in bytes.
const NAME_BYTES_MAX: usize = 40;
/// How long a VMM may take to answer everything.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

/// Why there are no samples.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// The VMM's socket cannot be used.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("the VMM does not answer")]
    NoAnswer,
    /// It answered something else, as one of an older version does.
    #[error("the VMM does not tell what it counts")]
    Confused,
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> StatsError {
    move |source| StatsError::Io { operation, source: source.into() }
}

/// All samples of the VM with this folder of sockets.
///
/// # Errors
/// See [`StatsError`].
pub fn read(sockets: &Path) -> Result<Vec<Sample>, StatsError> {
    let wrong = failed::<Errno>("connect to the VMM");
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(&wrong)?;
    let address = UnixAddr::new(&sockets.join(CONTROL_SOCKET)).map_err(&wrong)?;
    connect(fd.as_raw_fd(), &address).map_err(&wrong)?;
    let deadline = Instant::now() + ANSWER_TIME_MAX;
    let mut samples = vec![];
    let mut from = 0usize;
    loop {
        let page = ask(&fd, u32::try_from(from).unwrap_or(u32::MAX), deadline)?;
        from = from.saturating_add(page.samples.len());
        let over = page.samples.is_empty() || from >= page.total as usize || from >= SAMPLES_MAX;
        samples.extend(page.samples.into_iter().filter(is_sound));
        if over {
            samples.truncate(SAMPLES_MAX);
            return Ok(samples);
        }
    }
}

fn ask(fd: &OwnedFd, from: u32, deadline: Instant) -> Result<blixard_vmm_api::stats::Samples, StatsError> {
    let request = serde_json::to_vec(&Request::Metrics { from }).map_err(failed("write a request"))?;
    send(fd.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL).map_err(failed("ask the VMM"))?;
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    let length = loop {
        match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
            Ok(0) => return Err(StatsError::NoAnswer),
            Ok(length) => break length,
            Err(Errno::EAGAIN) => wait(fd, deadline)?,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed("hear the VMM")(errno)),
        }
    };
    let bytes = buffer.get(..length).ok_or(StatsError::Confused)?;
    match serde_json::from_slice(bytes) {
        Ok(FromVmm::Reply(Reply::Metrics(page))) => Ok(page),
        _ => Err(StatsError::Confused),
    }
}

fn wait(fd: &OwnedFd, deadline: Instant) -> Result<(), StatsError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(StatsError::NoAnswer);
    }
    let ms = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).saturating_add(1);
    match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(ms)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(failed("wait for the VMM")(errno)),
    }
}

/// Whether names and buckets are as a VMM of ours makes them.
fn is_sound(sample: &Sample) -> bool {
    let plain = |name: &str| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(allowed)
    };
    let bounded = match &sample.value {
        Value::Count(_) => true,
        Value::Histogram(histogram) => histogram.buckets.len() <= BUCKETS_MAX,
    };
    bounded && plain(&sample.device) && plain(&sample.name)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use blixard_vmm_api::stats::{Histogram, Samples};
    use nix::sys::socket::{Backlog, accept, bind, listen};

    use super::*;

    fn sample(device: &str, name: &str, value: Value) -> Sample {
        Sample { device: device.into(), queue: None, name: name.into(), value }
    }

    /// Reads from a VMM that answers with these messages, one per request, and then is silent.
    fn read_from(answers: Vec<Vec<u8>>) -> Result<Vec<Sample>, StatsError> {
        let folder = tempfile::tempdir().unwrap();
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let address = UnixAddr::new(&folder.path().join(CONTROL_SOCKET)).unwrap();
        bind(listener.as_raw_fd(), &address).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let vmm = thread::spawn(move || {
            let client = accept(listener.as_raw_fd()).unwrap();
            let mut request = [0; 1000];
            for answer in answers {
                if recv(client, &mut request, MsgFlags::empty()).unwrap() == 0 {
                    return;
                }
                send(client, &answer, MsgFlags::empty()).unwrap();
            }
            // Until the agent gives up.
            while recv(client, &mut request, MsgFlags::empty()).is_ok_and(|length| length > 0) {}
        });
        let result = read(folder.path());
        vmm.join().unwrap();
        result
    }

    fn page(samples: Vec<Sample>, total: u32) -> Vec<u8> {
        serde_json::to_vec(&FromVmm::Reply(Reply::Metrics(Samples { samples, total }))).unwrap()
    }

    #[test]
    fn all_pages_are_read_and_unsound_samples_left_out() {
        let good = |n: u64| sample("net.nic0", "received_frames", Value::Count(n));
        let long = Histogram { sum: 0, buckets: vec![0; BUCKETS_MAX + 1] };
        let first = vec![
            good(1),
            sample("evil\"} 1\n", "a", Value::Count(0)),
            sample("a", &"n".repeat(41), Value::Count(0)),
            sample("a", "b", Value::Histogram(long)),
        ];
        let read = read_from(vec![page(first, 5), page(vec![good(2)], 5)]).unwrap();
        assert_eq!(read, [good(1), good(2)]);
    }

    #[test]
    fn a_vmm_that_tells_forever_nonsense_or_nothing_is_left_alone() {
        let endless = page(vec![sample("a", "b", Value::Count(0)); 200], u32::MAX);
        assert_eq!(read_from(vec![endless; 40]).unwrap().len(), SAMPLES_MAX);
        assert_eq!(read_from(vec![page(vec![], u32::MAX)]).unwrap(), []);
        let old = serde_json::to_vec(&FromVmm::Reply(Reply::Refused { reason: "unknown".into() })).unwrap();
        assert!(matches!(read_from(vec![old]), Err(StatsError::Confused)));
        assert!(matches!(read_from(vec![vec![b'x'; 10]]), Err(StatsError::Confused)));
        assert!(matches!(read_from(vec![]), Err(StatsError::NoAnswer)));
    }
}
