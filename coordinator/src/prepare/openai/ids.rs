//! A prompt of token ids, taken out of a body before the rest of it is parsed: a list of 30,000 numbers is read several times
//! as fast as JSON in general is.
//!
//! Only what is plainly so is taken: `prompt` of the body's own object, before anything odd, with ids as everybody writes
//! them. Whatever else there is, right or wrong, is left to the parser, which decides.

use std::ops::Range;

/// Where in `body` a prompt's list of ids is, and the ids; `None`: there is none that is plainly so.
pub(super) fn plain_ids(body: &[u8]) -> Option<(Range<usize>, Vec<u32>)> {
    let mut reader = Reader { body, at: 0 };
    reader.expect(b'{')?;
    loop {
        let name = reader.string()?;
        reader.expect(b':')?;
        if name == b"prompt" {
            reader.space();
            let from = reader.at;
            let ids = reader.ids()?;
            return Some((from..reader.at, ids));
        }
        reader.skip()?;
        reader.expect(b',')?;
    }
}

struct Reader<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.body.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.space();
        let is_there = self.peek()? == byte;
        self.at += 1;
        is_there.then_some(())
    }

    /// A string, as it is written; none with escapes.
    fn string(&mut self) -> Option<&'a [u8]> {
        self.expect(b'"')?;
        let rest = &self.body[self.at..];
        let length = memchr::memchr2(b'"', b'\\', rest)?;
        self.at += length + 1;
        (rest[length] == b'"').then_some(&rest[..length])
    }

    /// Goes past a value: a string, a number or a word. What is in it is for the parser to judge.
    fn skip(&mut self) -> Option<()> {
        self.space();
        match self.peek()? {
            b'"' => self.string().map(drop),
            b'{' | b'[' => None,
            _ => {
                let rest = &self.body[self.at..];
                self.at += rest.iter().position(|byte| matches!(byte, b',' | b'}' | b'"'))?;
                Some(())
            }
        }
    }

    /// A list of ids, at least one.
    fn ids(&mut self) -> Option<Vec<u32>> {
        self.expect(b'[')?;
        // Most are of five digits at most, with a comma and perhaps a space behind.
        let mut ids = Vec::with_capacity((self.body.len() - self.at) / 6);
        loop {
            self.space();
            let from = self.at;
            let mut id = 0u32;
            while let Some(digit @ b'0'..=b'9') = self.peek() {
                id = id.checked_mul(10)?.checked_add(u32::from(digit - b'0'))?;
                self.at += 1;
            }
            // JSON has no number of no digits, nor one that begins with 0 and goes on.
            if self.at == from || self.body[from] == b'0' && self.at > from + 1 {
                return None;
            }
            ids.push(id);
            self.space();
            self.at += 1;
            match self.body.get(self.at - 1)? {
                b',' => {}
                b']' => return Some(ids),
                _ => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_plainly_a_list_of_ids_is_taken() {
        let cases: [(&str, &[u32]); 5] = [
            (r#"{"prompt": [1,2, 30 , 0]}"#, &[1, 2, 30, 0]),
            (r#" { "model":"m", "n" : 2, "stream":true,"prompt":[4294967295] , "x": {}}"#, &[u32::MAX]),
            (r#"{"model": "a, b", "prompt":[7], "prompt": 5"#, &[7]),
            ("{\"prompt\"\n:\t[\r1 ]", &[1]),
            (r#"{"a":null,"prompt":[12,345]}"#, &[12, 345]),
        ];
        for (body, expected) in cases {
            let (at, ids) = plain_ids(body.as_bytes()).expect(body);
            assert_eq!(ids, expected, "{body}");
            assert!(body[at.clone()].starts_with('[') && body[at].ends_with(']'), "{body}");
        }
    }

    #[test]
    fn all_else_is_left_to_the_parser() {
        for body in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"prompt""#,
            r#"{"prompt":["#,
            r#"{"prompt":[1"#,
            r#"{"prompt":[1,"#,
            r#"{"prompt":[]}"#,
            r#"{"prompt":[01]}"#,
            r#"{"prompt":[00]}"#,
            r#"{"prompt":[1 2]}"#,
            r#"{"prompt":[-1]}"#,
            r#"{"prompt":[1.0]}"#,
            r#"{"prompt":[1e3]}"#,
            r#"{"prompt":[4294967296]}"#,
            r#"{"prompt":["a"]}"#,
            r#"{"prompt":[1,]}"#,
            r#"{"prompt":[[1]]}"#,
            r#"{"prompt":"[1]"}"#,
            r#"{"a":{"prompt":[1]}}"#,
            r#"{"a":"\"","prompt":[1]}"#,
            r#"{"pr\u006fmpt":[1]}"#,
            r#"{"a" 1,"prompt":[1]}"#,
        ] {
            assert_eq!(plain_ids(body.as_bytes()), None, "{body}");
        }
    }
}
