//! What running VMs are asked: our control socket (one JSON datagram each way) and Firecracker's HTTP on a Unix socket.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg, socket,
};
use serde_json::Value;

use super::VmmError;

/// Largest answer in bytes.
const ANSWER_BYTES: usize = 64 << 10;
/// Longest wait for a socket to appear.
const PATIENCE: Duration = Duration::from_secs(30);

fn failed(path: &Path) -> impl Fn(io::Error) -> VmmError + '_ {
    move |error| VmmError::file(path, error)
}

/// Asks our VMM, with descriptors beside the request.
///
/// # Errors
/// There is no VMM, or it refuses.
pub fn ask(path: &Path, request: &Value, beside: &[OwnedFd]) -> Result<Value, VmmError> {
    let failed = failed(path);
    let address = UnixAddr::new(path).map_err(io::Error::from).map_err(&failed)?;
    let made = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    let fd = made.map_err(io::Error::from).map_err(&failed)?;
    connect(fd.as_raw_fd(), &address).map_err(io::Error::from).map_err(&failed)?;
    let text = request.to_string();
    let numbers: Vec<_> = beside.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights = if numbers.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(text.as_bytes())], rights, MsgFlags::empty(), None)
        .map_err(io::Error::from)
        .map_err(&failed)?;
    let mut answer = vec![0; ANSWER_BYTES];
    let length =
        recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(io::Error::from).map_err(&failed)?;
    let answer: Value = serde_json::from_slice(answer.get(..length).unwrap_or_default())
        .map_err(io::Error::other)
        .map_err(&failed)?;
    if answer.pointer("/reply/refused").is_some() {
        return Err(failed(io::Error::other(answer.to_string())));
    }
    Ok(answer)
}

/// Connects to a stream socket as soon as it is there.
fn reach(path: &Path) -> Result<UnixStream, VmmError> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            // Whoever makes the socket gives no other sign.
            Err(_) if begun.elapsed() < PATIENCE => thread::sleep(Duration::from_micros(100)),
            Err(error) => return Err(failed(path)(error)),
        }
    }
}

/// Asks Firecracker.
///
/// # Errors
/// There is none, or it refuses.
pub fn http(path: &Path, method: &str, target: &str, body: &Value) -> Result<(), VmmError> {
    let failed = failed(path);
    let mut stream = reach(path)?;
    let body = body.to_string();
    let length = body.len();
    let head = format!("{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
    write!(stream, "{head}Content-Length: {length}\r\n\r\n{body}").map_err(&failed)?;
    let (mut answer, mut part) = (vec![], [0; 4096]);
    while !answer.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        let count = stream.read(&mut part).map_err(&failed)?;
        if count == 0 {
            break;
        }
        answer.extend_from_slice(part.get(..count).unwrap_or_default());
    }
    let text = String::from_utf8_lossy(&answer);
    if text.starts_with("HTTP/1.1 2") { Ok(()) } else { Err(failed(io::Error::other(text.into_owned()))) }
}
