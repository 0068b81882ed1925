//! An origin whose answers are written by the test, byte for byte.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

/// What becomes of a connection after an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Keep,
    Close,
}

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// Its number, from 0.
    pub(super) number: usize,
    /// The number of the connection, from 0.
    pub(super) connection: usize,
    /// What is asked for: the path with its query, or a whole address of a proxy.
    pub(super) target: String,
    head: String,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The range that is asked for, cut to `size`.
    pub(super) fn range(&self, size: u64) -> Range<u64> {
        let (first, last) = self.header("range").unwrap()[6..].split_once('-').unwrap();
        first.parse().unwrap()..(last.parse::<u64>().unwrap() + 1).min(size)
    }

    /// The answer that a sound server gives from `image`, with further header lines.
    pub(super) fn part(&self, image: &[u8], lines: &str) -> Vec<u8> {
        let range = self.range(image.len() as u64);
        let (first, last, size) = (range.start, range.end - 1, image.len());
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}\r\n\
             Content-Length: {}\r\n{lines}\r\n",
            range.end - range.start,
        );
        [head.as_bytes(), &image[super::span(&range)]].concat()
    }
}

/// A server that ends with its test.
pub(super) struct Origin {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    connections: Arc<AtomicUsize>,
    is_over: Arc<AtomicBool>,
}

impl Origin {
    /// Starts a server that answers with `answer`, which writes to the connection itself.
    pub(super) fn start(
        answer: impl Fn(&Request, &mut TcpStream) -> Then + Send + Sync + 'static,
    ) -> Self {
        Self::on("127.0.0.1:0", answer)
    }

    /// Starts one at `place`.
    pub(super) fn on(
        place: &str,
        answer: impl Fn(&Request, &mut TcpStream) -> Then + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(place).unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, connections) = (Arc::default(), Arc::<AtomicUsize>::default());
        let is_over = Arc::<AtomicBool>::default();
        let answer = Arc::new(answer);
        let (noted, counted, over) = (Arc::clone(&requests), connections.clone(), is_over.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let number = counted.fetch_add(1, Ordering::SeqCst);
                let (noted, answer) = (Arc::clone(&noted), Arc::clone(&answer));
                thread::spawn(move || serve(stream.unwrap(), number, &noted, &*answer));
            }
        });
        Self { address, requests, connections, is_over }
    }

    /// Starts one that writes what `answer` returns, and keeps connections.
    pub(super) fn writing(answer: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::start(move |request, stream| {
            let _ = stream.write_all(&answer(request));
            Then::Keep
        })
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        self.requests.lock().clone()
    }

    pub(super) fn count(&self) -> usize {
        self.requests.lock().len()
    }

    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(
    mut stream: TcpStream,
    connection: usize,
    noted: &Mutex<Vec<Request>>,
    answer: &(impl Fn(&Request, &mut TcpStream) -> Then + ?Sized),
) {
    // A client that is silent for so long is gone.
    let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
    let _ = stream.set_write_timeout(Some(Duration::from_secs(20)));
    let mut head = Vec::new();
    let mut byte = [0];
    loop {
        head.clear();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return,
            }
        }
        let text = String::from_utf8(head.clone()).unwrap();
        let target = text.split(' ').nth(1).unwrap().to_owned();
        let request = {
            let mut noted = noted.lock();
            let number = noted.len();
            let request = Request { number, connection, target, head: text };
            noted.push(request.clone());
            request
        };
        if answer(&request, &mut stream) == Then::Close {
            return;
        }
    }
}
