//! One connection of HTTP/1.1, as far as the bench needs it: a request, then its answer, whole or in chunks.

use std::{borrow::Cow, io, time::Instant};

use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Most bytes of an answer's head.
const HEAD_MOST: usize = 64 << 10;

pub(super) struct Connection {
    stream: TcpStream,
    /// Read and not yet taken.
    read: Vec<u8>,
    closes: bool,
}

/// What was answered, and when its first text was there.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) first: Option<Instant>,
    body: Vec<u8>,
}

enum Length {
    Chunked,
    Bytes(usize),
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Connection {
    pub(super) async fn open(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, read: Vec::with_capacity(16 << 10), closes: false })
    }

    /// The last answer was read to its end, and the peer keeps the connection.
    pub(super) fn is_reusable(&self) -> bool {
        !self.closes && self.read.is_empty()
    }

    pub(super) async fn ask(&mut self, request: &[u8], stream: bool) -> io::Result<Answer> {
        self.stream.write_all(request).await?;
        let (status, length) = self.head().await?;
        let mut answer = Answer { status, first: None, body: Vec::new() };
        let mut searched = 0;
        loop {
            let ended = match length {
                Length::Bytes(bytes) => {
                    let most = (bytes - answer.body.len()).min(self.read.len());
                    answer.body.extend(self.read.drain(..most));
                    answer.body.len() == bytes
                }
                Length::Chunked => self.take_chunks(&mut answer.body)?,
            };
            if stream && answer.first.is_none() && has_text(&answer.body, &mut searched) {
                answer.first = Some(Instant::now());
            }
            if ended {
                return Ok(answer);
            }
            self.more().await?;
        }
    }

    async fn more(&mut self) -> io::Result<()> {
        match self.stream.read_buf(&mut self.read).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn head(&mut self) -> io::Result<(u16, Length)> {
        let end = loop {
            if let Some(end) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            if self.read.len() > HEAD_MOST {
                return Err(broken("a head without an end"));
            }
            self.more().await?;
        };
        let head = String::from_utf8_lossy(&self.read[..end]).to_ascii_lowercase();
        self.read.drain(..end + 4);
        let status = head.split_ascii_whitespace().nth(1).and_then(|status| status.parse().ok());
        let field = |name: &str| {
            let fields = head.split("\r\n").filter_map(|line| line.split_once(':'));
            fields.into_iter().find(|(of, _)| *of == name).map(|(_, value)| value.trim())
        };
        self.closes = field("connection") == Some("close");
        let length = match (field("transfer-encoding"), field("content-length")) {
            (Some("chunked"), _) => Length::Chunked,
            (_, Some(bytes)) => Length::Bytes(bytes.parse().map_err(|_| broken("a length that is none"))?),
            _ => return Err(broken("an answer without a length")),
        };
        Ok((status.ok_or_else(|| broken("a head without a status"))?, length))
    }

    /// Moves whole chunks to `body`. True: that was the last.
    fn take_chunks(&mut self, body: &mut Vec<u8>) -> io::Result<bool> {
        let mut taken = 0;
        let ended = loop {
            let rest = &self.read[taken..];
            let Some(line) = rest.windows(2).position(|window| window == b"\r\n") else { break false };
            let size = std::str::from_utf8(&rest[..line]).ok();
            let size = size.and_then(|size| usize::from_str_radix(size.trim(), 16).ok());
            let size = size.ok_or_else(|| broken("a chunk without a size"))?;
            let (start, end) = (line + 2, line + 2 + size);
            if rest.len() < end + 2 {
                break false;
            }
            body.extend_from_slice(&rest[start..end]);
            taken += end + 2;
            if size == 0 {
                break true;
            }
        };
        self.read.drain(..taken);
        Ok(ended)
    }
}

/// Whether some text has come; what was searched is not searched again.
fn has_text(body: &[u8], searched: &mut usize) -> bool {
    const MARKS: [&[u8]; 2] = [b"\"content\":\"", b"\"text\":\""];
    let from = searched.saturating_sub(16);
    *searched = body.len();
    let found = |mark: &[u8]| {
        let mut at = body[from..].windows(mark.len() + 1);
        at.any(|window| window.starts_with(mark) && window[mark.len()] != b'"')
    };
    MARKS.into_iter().any(found)
}

#[derive(Deserialize)]
struct Whole<'a> {
    #[serde(borrow)]
    choices: Vec<Choice<'a>>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, default, alias = "message")]
    delta: Option<Said<'a>>,
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Said<'a> {
    #[serde(borrow, default)]
    content: Option<Cow<'a, str>>,
}

impl Answer {
    /// For an error: the beginning of the body.
    pub(super) fn body_start(&self) -> String {
        String::from_utf8_lossy(&self.body).chars().take(300).collect()
    }

    /// All text of all events, or of the whole answer.
    pub(super) fn text(&self, stream: bool) -> Result<String, String> {
        let body = std::str::from_utf8(&self.body).map_err(|_| "it is not UTF-8".to_owned())?;
        let mut text = String::new();
        let mut add = |json: &str| {
            let whole: Whole<'_> =
                serde_json::from_str(json).map_err(|error| format!("{error} in {json:.200}"))?;
            for choice in whole.choices {
                let said = choice.delta.and_then(|delta| delta.content).or(choice.text);
                text.extend(said);
            }
            Ok::<_, String>(())
        };
        if !stream {
            add(body)?;
            return Ok(text);
        }
        let mut done = false;
        for line in body.lines() {
            match line.strip_prefix("data: ") {
                Some("[DONE]") => done = true,
                Some(json) => add(json)?,
                None => {}
            }
        }
        if done { Ok(text) } else { Err("the stream ended without its end mark".to_owned()) }
    }
}
