//! A request body as a source that blocking code can read.

use std::io::{self, Read};

use axum::body::{Body, Bytes};
use http_body_util::BodyExt;
use tokio::sync::mpsc;

use crate::api::BODY_TIME_MAX;

/// Parts of the body that wait to be read: bounds what an upload holds in memory.
const PARTS_WAITING: usize = 16;

/// The reading end. Blocks: it belongs on a thread that may wait.
pub struct Upload {
    parts: mpsc::Receiver<io::Result<Bytes>>,
    part: Bytes,
}

/// Lets a blocking reader take the bytes of `body`. The returned future moves them and ends with the body, or when the
/// reader is dropped.
pub fn upload(body: Body) -> (Upload, impl Future<Output = ()> + Send) {
    let (sender, parts) = mpsc::channel(PARTS_WAITING);
    (Upload { parts, part: Bytes::new() }, pump(body, sender))
}

async fn pump(mut body: Body, parts: mpsc::Sender<io::Result<Bytes>>) {
    loop {
        let frame = match tokio::time::timeout(BODY_TIME_MAX, body.frame()).await {
            Err(_) => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "nothing more of the upload arrived in time"))
            }
            Ok(None) => return,
            Ok(Some(Err(error))) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, error)),
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) if !data.is_empty() => Ok(data),
                _ => continue,
            },
        };
        let last = frame.is_err();
        if parts.send(frame).await.is_err() || last {
            return;
        }
    }
}

impl Read for Upload {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.part.is_empty() {
            match self.parts.blocking_recv() {
                None => return Ok(0),
                Some(part) => self.part = part?,
            }
        }
        let count = buffer.len().min(self.part.len());
        let taken = self.part.split_to(count);
        for (to, from) in buffer.iter_mut().zip(taken.iter()) {
            *to = *from;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_bytes_arrive_in_order() {
        let chunks: Vec<Bytes> = (0..100u8).map(|n| Bytes::from(vec![n; usize::from(n)])).collect();
        let expected: Vec<u8> = chunks.iter().flatten().copied().collect();
        let body = Body::from_stream(futures::stream::iter(chunks.into_iter().map(io::Result::Ok)));
        let (mut source, moved) = upload(body);
        let reader = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            source.read_to_end(&mut all).map(|_| all)
        });
        moved.await;
        assert_eq!(reader.await.unwrap().unwrap(), expected);
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_an_error_and_no_end() {
        let parts = vec![Ok(Bytes::from_static(b"half")), Err(io::Error::other("gone"))];
        let (mut source, moved) = upload(Body::from_stream(futures::stream::iter(parts)));
        let reader = tokio::task::spawn_blocking(move || source.read_to_end(&mut Vec::new()));
        moved.await;
        assert_eq!(reader.await.unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_reader_that_gives_up_ends_the_transfer() {
        let endless = futures::stream::repeat_with(|| io::Result::Ok(Bytes::from_static(&[0; 1000])));
        let (source, moved) = upload(Body::from_stream(endless));
        drop(source);
        moved.await;
    }
}
