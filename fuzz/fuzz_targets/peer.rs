//! What another member can send: frames, and in them append requests, answers, questions, beginnings of snapshots.
#![no_main]

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use blixard_node::raft::codec::{Reader, put_append, put_appended};
use blixard_node::raft::peer::call::Question;
use blixard_node::raft::peer::frame::{self, Kind};
use blixard_node::raft::peer::snapshot::Begin;
use libfuzzer_sys::fuzz_target;

/// Everything is there already, so nothing is ever waited for.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("a slice never waits"),
    }
}

fn append(content: &[u8]) {
    let Ok(request) = Reader(content).append() else { return };
    let mut again = Vec::new();
    put_append(&mut again, &request).unwrap();
    let read = Reader(&again).append().unwrap();
    let mut third = Vec::new();
    put_append(&mut third, &read).unwrap();
    assert_eq!(again, third);
    for entry in &request.entries {
        if let openraft::EntryPayload::Normal(command) = &entry.payload {
            // It is one that this program knows, or none.
            command.proposal().ok();
        }
    }
}

fn answer(content: &[u8]) {
    let Ok(answer) = Reader(content).appended() else { return };
    let mut again = Vec::new();
    put_appended(&mut again, &answer);
    assert_eq!(again, content);
}

fuzz_target!(|bytes: &[u8]| {
    let mut stream = bytes;
    while let Ok(Some(frame)) = now(frame::read(&mut stream)) {
        match frame.kind {
            Kind::Append => {
                append(&frame.content);
                answer(&frame.content);
            }
            Kind::Call => drop(serde_json::from_slice::<Question>(&frame.content)),
            Kind::SnapshotBegin => drop(serde_json::from_slice::<Begin>(&frame.content)),
            _ => {}
        }
    }
});
