//! The client against a server that says exactly what a test tells it to say.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::*;
use crate::watch::Change;

/// A server that reads one request per connection, answers with the next of its answers, and closes.
struct Server {
    client: Client,
    seen: Arc<Mutex<Vec<String>>>,
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Server {
    fn with(answers: Vec<Vec<u8>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let seen = Arc::new(Mutex::new(vec![]));
        let log = seen.clone();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let request = read_request(&mut stream).await;
                log.lock().unwrap().push(request);
                stream.write_all(&answer).await.unwrap();
            }
        });
        Self { client: Client::new(Host::Unix(path.clone())), seen, _folder: folder, path }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// Head and body of a request, up to the length that it announces.
async fn read_request(stream: &mut UnixStream) -> String {
    let mut bytes = vec![];
    loop {
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|l| l.strip_prefix("content-length: "))
                .map_or(0, |n| n.parse().unwrap());
            let chunked = head.contains("transfer-encoding: chunked");
            if (chunked && body.ends_with("0\r\n\r\n")) || (!chunked && body.len() >= length) {
                return String::from_utf8_lossy(&bytes).into_owned();
            }
        }
        let mut buffer = [0; 4096];
        let length = stream.read(&mut buffer).await.unwrap();
        assert!(length > 0, "the request ended early: {bytes:?}");
        bytes.extend_from_slice(&buffer[..length]);
    }
}

fn answer(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn refused(status: &str, retryable: bool) -> Vec<u8> {
    let body = format!(
        r#"{{"error":"conflict","message":"a VM \"web\" is there","details":[{{"field":"name","code":"taken","message":"twice"}}],
        "request_id":"r7","suggestion":"another name","retryable":{retryable}}}"#
    );
    answer(status, &body)
}

const VM: &str = r#"{"id":"01ARZ3NDEKTSV4RRFFQ69G5FAV","name":"web","project":"default","spec":{"image":"i"},"generation":1,
    "created_at_ms":1,"desired":"running","phase":"running","epoch":1,"start":1,"image_digest":"sha256:0"}"#;

#[tokio::test]
async fn names_of_users_are_escaped_in_paths_and_queries() {
    let server = Server::with(vec![answer("200 OK", VM), answer("200 OK", r#"{"items":[],"revision":1}"#)]);
    server.client.vm("a/b", "web?x=1#y z").await.unwrap();
    server.client.list_vms("p", &["k=a&b".into()]).await.unwrap();
    let seen = server.seen();
    assert!(seen[0].starts_with("GET /v1/projects/a%2Fb/vms/web%3Fx%3D1%23y%20z HTTP/1.1"), "{}", seen[0]);
    assert!(seen[1].starts_with("GET /v1/projects/p/vms?label=k%3Da%26b HTTP/1.1"), "{}", seen[1]);
}

#[tokio::test]
async fn a_refusal_keeps_everything_the_node_said() {
    let server = Server::with(vec![refused("409 Conflict", false)]);
    let error = server.client.vm("p", "web").await.unwrap_err();
    assert_eq!((error.status(), error.suggestion().as_deref()), (Some(409), Some("another name")));
    let refusal = error.refusal().unwrap();
    assert_eq!((refusal.error.request_id.as_str(), refusal.error.details[0].field.as_str()), ("r7", "name"));
    assert_eq!(error.to_string(), "a VM \"web\" is there");
}

#[tokio::test]
async fn a_retryable_refusal_is_tried_again_with_the_same_idempotency_key() {
    let server =
        Server::with(vec![refused("503 Busy", true), refused("503 Busy", true), answer("200 OK", VM)]);
    server.client.start_vm("p", "web").await.unwrap();
    let keys: Vec<String> = server
        .seen()
        .iter()
        .map(|r| r.lines().find(|l| l.starts_with("idempotency-key: ")).unwrap().to_owned())
        .collect();
    assert_eq!(keys.len(), 3);
    assert!(keys.iter().all(|k| *k == keys[0] && k.len() == "idempotency-key: ".len() + 32), "{keys:?}");
}

#[tokio::test]
async fn a_wait_that_took_its_time_is_not_tried_again() {
    let server = Server::with(vec![refused("408 Timeout", true), answer("200 OK", VM)]);
    let wait = Wait { until: vec!["ready".into()], time: Duration::from_secs(1) };
    assert_eq!(server.client.wait_vm("p", "web", &wait).await.unwrap_err().status(), Some(408));
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn a_node_that_does_not_serve_still_says_how_it_is() {
    let body = r#"{"ready":false,"leader":null,"agent":false,"problems":["no leader is known"]}"#;
    let server = Server::with(vec![answer("503 Service Unavailable", body)]);
    let health = server.client.health().await.unwrap();
    assert_eq!((health.ready, health.problems.len()), (false, 1));
}

#[tokio::test]
async fn what_is_not_of_this_api_is_told_as_such() {
    let server = Server::with(vec![
        answer("502 Bad Gateway", "<html>proxy</html>"),
        answer("200 OK", "<html>hello</html>"),
        b"SSH-2.0-OpenSSH\r\n".to_vec(),
    ]);
    let error = server.client.vm("p", "web").await.unwrap_err();
    assert!(matches!(&error, ClientError::Foreign { what, .. } if what.contains("proxy")), "{error}");
    assert!(matches!(server.client.vm("p", "web").await, Err(ClientError::Unreadable { .. })));
    let error = server.client.vm("p", "web").await.unwrap_err();
    assert!(matches!(error, ClientError::Broken { .. }), "{error}");
    assert!(error.suggestion().is_some());
}

#[tokio::test]
async fn a_socket_that_is_missing_or_dead_says_what_to_try() {
    let server = Server::with(vec![]);
    let missing = Client::new(Host::Unix(server.path.with_file_name("other.sock")));
    let advice = missing.version().await.unwrap_err().suggestion().unwrap();
    assert!(advice.contains("no such socket") && advice.contains("blixard dev"), "{advice}");
    // The listener has gone, its file has not.
    while UnixStream::connect(&server.path).await.is_ok() {
        tokio::task::yield_now().await;
    }
    let advice = server.client.version().await.unwrap_err().suggestion().unwrap();
    assert!(advice.contains("nobody listens"), "{advice}");
}

#[tokio::test]
async fn all_pages_of_a_list_are_one_list_with_the_revision_of_the_first() {
    let server = Server::with(vec![
        answer("200 OK", &format!(r#"{{"items":[{VM}],"cursor":"a b","revision":5}}"#)),
        answer("200 OK", &format!(r#"{{"items":[{VM}],"revision":9}}"#)),
    ]);
    let page = server.client.list_vms("p", &["a=b".into()]).await.unwrap();
    assert_eq!((page.items.len(), page.revision, page.cursor), (2, 5, None));
    assert!(server.seen()[1].starts_with("GET /v1/projects/p/vms?label=a%3Db&cursor=a%20b HTTP"));
}

#[tokio::test]
async fn a_watch_goes_on_after_the_last_revision_when_its_connection_breaks() {
    let line = |revision: u64| {
        format!("{{\"revision\":{revision},\"change\":{{\"vm\":{}}}}}\n", VM.replace('\n', ""))
    };
    let beat = "{\"revision\":8,\"change\":\"beat\"}\n";
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let seven = line(7);
    let (first, second) = seven.split_at(30);
    let server = Server::with(vec![
        // An event in two pieces, a beat, then the connection breaks in the middle of a line.
        format!("{head}{}{}{}", chunk(first), chunk(&format!("{second}{beat}")), chunk("{\"rev"))
            .into_bytes(),
        refused("503 Busy", true),
        format!("{head}{}0\r\n\r\n", chunk(&line(9))).into_bytes(),
        refused("410 Gone", false),
    ]);
    let mut watch = server.client.watch(3);
    assert_eq!(watch.next().await.unwrap().revision, 7);
    let event = watch.next().await.unwrap();
    assert_eq!(event.revision, 9);
    assert!(matches!(event.change, Change::Vm(view) if view.name == "web"));
    let error = watch.next().await.unwrap_err();
    assert_eq!(error.status(), Some(410));
    let asked: Vec<String> = server.seen().iter().map(|r| r.split(' ').nth(1).unwrap().to_owned()).collect();
    assert_eq!(asked, ["/v1/watch?after=3", "/v1/watch?after=8", "/v1/watch?after=8", "/v1/watch?after=9"]);
}

#[tokio::test]
async fn an_upload_arrives_whole_and_tells_how_far_it_is() {
    let image =
        r#"{"name":"i","digest":"sha256:0","size_bytes":1,"fs":"erofs","created_at_ms":1,"config":{}}"#;
    let server = Server::with(vec![answer("201 Created", image), answer("201 Created", image)]);
    let body = "x".repeat(600_000);
    let told = Arc::new(Mutex::new(vec![]));
    let log = told.clone();
    let upload = Upload::new(std::io::Cursor::new(body.clone().into_bytes()))
        .with_length(600_000)
        .with_progress(move |n| log.lock().unwrap().push(n));
    server.client.import_image("a:b", upload).await.unwrap();
    server.client.import_image("c", Upload::new(std::io::Cursor::new(b"abc".to_vec()))).await.unwrap();
    let seen = server.seen();
    assert!(seen[0].starts_with("POST /v1/images?name=a%3Ab HTTP/1.1"));
    assert!(seen[0].ends_with(&format!("\r\n\r\n{body}")));
    assert!(seen[1].ends_with("3\r\nabc\r\n0\r\n\r\n"), "{}", seen[1]);
    let told = told.lock().unwrap();
    assert!(told.len() > 1 && told.is_sorted() && told.last() == Some(&600_000), "{told:?}");
}

#[tokio::test]
async fn an_upload_that_is_refused_before_its_end_tells_why_and_a_file_that_shrinks_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node.sock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 64 << 10];
        let _ = stream.read(&mut buffer).await.unwrap();
        stream.write_all(&refused("413 Too Large", false)).await.unwrap();
        // The client must see the answer though nobody reads on.
        let _open = (stream, listener.accept().await);
    });
    let client = Client::new(Host::Unix(path));
    let error = client.import_image("i", Upload::new(tokio::io::repeat(7))).await.unwrap_err();
    assert_eq!(error.status(), Some(413), "{error}");
    let short = Upload::new(std::io::Cursor::new(vec![0; 10])).with_length(20);
    let server = Server::with(vec![]);
    assert!(server.client.import_image("i", short).await.is_err());
    let huge = Upload::new(tokio::io::empty()).with_length(UPLOAD_BYTES_MAX + 1);
    assert!(matches!(server.client.import_image("i", huge).await, Err(ClientError::BadRequest(_))));
}

#[tokio::test]
async fn a_stream_carries_bytes_both_ways_and_a_refused_one_tells_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: blixard-stream\r\n\r\nhello")
            .await
            .unwrap();
        let mut said = vec![0; 5];
        stream.read_exact(&mut said).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        stream.write_all(&refused("409 Conflict", false)).await.unwrap();
        (head.to_lowercase(), said)
    });
    let client = Client::new(Host::Unix(path));
    let mut stream = client.exec("p", "web").await.unwrap();
    let mut heard = vec![0; 5];
    stream.read_exact(&mut heard).await.unwrap();
    stream.write_all(b"again").await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(heard, b"hello");
    assert_eq!(client.console("p", "web").await.err().unwrap().status(), Some(409));
    let (head, said) = serving.await.unwrap();
    assert!(head.starts_with("post /v1/projects/p/vms/web:exec http/1.1"), "{head}");
    assert!(head.contains("upgrade: blixard-stream") && head.contains("connection: upgrade"), "{head}");
    assert_eq!(said, b"again");
}

#[tokio::test]
async fn a_wait_asks_for_its_moments_and_no_longer_than_the_node_allows() {
    let server = Server::with(vec![answer("200 OK", VM)]);
    let wait = Wait { until: vec!["ready".into(), "stopped".into()], time: Duration::MAX };
    server.client.wait_vm("p", "web", &wait).await.unwrap();
    assert!(
        server.seen()[0].starts_with("GET /v1/projects/p/vms/web?wait=ready,stopped&timeout_ms=600000 HTTP")
    );
}

#[test]
fn random_bits_differ() {
    assert_ne!(random().unwrap(), random().unwrap());
}
