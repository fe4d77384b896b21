//! What a client can send to the control socket: any message with any descriptors, by several clients that come and go.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use blixard_vmm_api::control::{FromVmm, MESSAGE_BYTES_MAX, Phase, Reply, Request, Status};

use super::Input;
use crate::control::{Answer, Answered, CLIENTS_MAX, Control};
use crate::memory::memfd;
use crate::passing;
use crate::poll::{Owner, Poll};

/// Most steps of one run.
const STEPS: usize = 100;
/// What requests begin with, so that the input need not guess the names.
const REQUESTS: [&str; 16] = [
    r#""status""#,
    r#""subscribe""#,
    r#""pause""#,
    r#""resume""#,
    r#""stop""#,
    r#""kill""#,
    r#""stats""#,
    r#"{"snapshot":"full"}"#,
    r#"{"snapshot":"diff"}"#,
    r#""fork""#,
    r#""working_set""#,
    r#"{"resize_disk":{"id":"root"}}"#,
    r#"{"swap_disk":{"id":"root"}}"#,
    r#"{"set_balloon":{"mib":4294967295}}"#,
    r#""start_hinting""#,
    r#"{"metrics":{"from":0}}"#,
];

/// Stands for the VM: a request is answered with what a VM could say, and with a file for a fork.
struct Vm {
    asked: usize,
    file: Arc<File>,
}

impl Vm {
    fn status() -> Status {
        serde_json::from_str(r#"{"vm":"01ARZ3NDEKTSV4RRFFQ69G5FAV","phase":"running"}"#).unwrap()
    }
}

impl Answer for Vm {
    fn answer(&mut self, request: &Request, given: Vec<OwnedFd>, _: &mut Poll) -> Answered {
        self.asked += 1;
        // What a request means is the same when it is written down and read again.
        let again = serde_json::to_vec(request).unwrap();
        assert_eq!(serde_json::from_slice::<Request>(&again).ok().as_ref(), Some(request));
        match request {
            Request::Status | Request::Subscribe => (Reply::Status(Self::status()), vec![]),
            Request::Fork => (Reply::Done, vec![self.file.clone(); given.len()]),
            Request::Stats => (Reply::Stats(BTreeMap::from([("requests".into(), 1)])), vec![]),
            _ => (Reply::Done, vec![]),
        }
    }
}

/// A listening socket with a name that the kernel chooses, and its address.
fn listener() -> (OwnedFd, libc::sockaddr_un, libc::socklen_t) {
    let socket = socket();
    let mut address = libc::sockaddr_un { sun_family: 1, sun_path: [0; 108] };
    let mut size = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: an address of the family only, whose size is given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), 2) };
    // SAFETY: no pointers are involved.
    let listens = unsafe { libc::listen(socket.as_raw_fd(), 64) };
    // SAFETY: the pointers are to an address and to its size.
    let named = unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut size) };
    assert_eq!((bound, listens, named), (0, 0, 0));
    (socket, address, size)
}

fn socket() -> OwnedFd {
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Messages of clients.
pub(super) fn control(data: &[u8]) {
    let mut input = Input::new(data);
    let (socket_listening, address, size) = listener();
    let mut poll = Poll::new().unwrap();
    let mut control = Control::new(socket_listening, &mut poll).unwrap();
    let mut vm = Vm { asked: 0, file: Arc::new(memfd(c"beside", 0).unwrap()) };
    let mut clients: Vec<OwnedFd> = vec![];
    let mut ready = vec![];
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let step = input.byte();
        match step & 7 {
            0 if clients.len() <= CLIENTS_MAX => {
                let client = socket();
                // SAFETY: the pointer is to an address of that size.
                let connected =
                    unsafe { libc::connect(client.as_raw_fd(), (&raw const address).cast(), size) };
                assert_eq!(connected, 0);
                clients.push(client);
            }
            1 => drop(clients.pop()),
            2 => control.changed(&Vm::status(), &mut poll),
            3 => {
                for client in &clients {
                    read(client);
                }
            }
            kind => {
                let Some(client) = clients.last() else { continue };
                let count = usize::from(step >> 3 & 3) * 3;
                let beside: Vec<RawFd> = (0..count).map(|_| vm.file.as_raw_fd()).collect();
                let known = REQUESTS[usize::from(input.byte()) % REQUESTS.len()].as_bytes();
                let length = usize::from(input.byte());
                let message = match kind {
                    4 => known.to_vec(),
                    5 => [known, input.bytes(length)].concat(),
                    6 => input.bytes(length * 8).to_vec(),
                    // A known one with some bytes changed, or one that is too long.
                    _ if length == 255 => vec![b' '; MESSAGE_BYTES_MAX + 1],
                    _ => {
                        let mut message = known.to_vec();
                        for _ in 0..length % 4 {
                            let place = usize::from(input.byte()) % message.len();
                            message[place] = input.byte();
                        }
                        message
                    }
                };
                passing::send(client, &message, &beside);
                clients.rotate_left(1);
            }
        }
        turn(&mut control, &mut poll, &mut vm, &mut ready);
    }
    // Who closes is forgotten.
    clients.clear();
    for _ in 0..STEPS {
        turn(&mut control, &mut poll, &mut vm, &mut ready);
        if ready.is_empty() {
            return;
        }
    }
    panic!("the control socket never comes to rest");
}

fn turn(control: &mut Control, poll: &mut Poll, vm: &mut Vm, ready: &mut Vec<(RawFd, u32)>) {
    poll.wait(0, ready).unwrap();
    for (fd, _) in ready.iter() {
        if let Some((Owner::Control, token)) = poll.owner(*fd) {
            control.on_event(token, poll, vm);
        }
    }
}

/// Everything that is there for a client is a message of the protocol.
fn read(client: &OwnedFd) {
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    while let Ok(Some(got)) = passing::receive(client, &mut buffer) {
        if got.length == 0 {
            return;
        }
        let message: FromVmm = serde_json::from_slice(&buffer[..got.length]).unwrap();
        if let FromVmm::Reply(Reply::Status(status)) = message {
            assert_eq!(status.phase, Phase::Running);
        }
    }
}
