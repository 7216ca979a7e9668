-- enqueue(root; id, birth…): step 1. Makes the record of a published task if there is none.
-- Answers {'new', created}, or {'stands', created, status, generation, hash}.
local function enqueue(keys, args)
  local k = keys_of(keys[1], args[1])
  local stands = redis.call('HMGET', k.job, 'created', 'status', 'generation', 'hash')
  if stands[1] then return { 'stands', stands[1], stands[2], stands[3], stands[4] } end
  local now = now_ms()
  local rec = make_record(k, birth_of(args, 2), now, now)
  return { 'new', rec.created }
end

-- `starts` counts this start already; retries are allowed for, so what is counted is starts that ended without a word.
local function granted(k, rec, max_starts)
  local dead = rec.stale > 0 and 'stale' or (rec.starts - rec.retries > max_starts and 'starts' or '')
  local reply = { 'run', rec.fence, rec.retries, math.max(0, rec.timeout - rec.ran), dead }
  if rec.starts > 1 or rec.retries > 0 or rec.fence > 1 then
    local done, marked = calls_of(k)
    for call, outcome in pairs(done) do reply[#reply + 1] = outcome .. call end
    for _, call in ipairs(marked) do reply[#reply + 1] = 'm' .. call end
  end
  return reply
end

-- Why a job that could be claimed now ends instead; true where it ended.
local function ends_at_claim(k, rec, now)
  if rec.cancel then
    end_cancelled(k, rec, now, rec.cancel)
  elseif rec.expires > 0 and rec.expires <= now and rec.started == 0 then
    end_failed(k, rec, now, 'expired', 'the job was not started before its expires_at; submit it again')
  elseif stop_clock(rec, now) >= rec.timeout then
    local _, marked = calls_of(k)
    if #marked > 0 then
      end_unknown(k, rec, now, marked)
    else
      end_failed(k, rec, now, 'timeout', 'the job used up its running time of ' .. (rec.timeout / 1000) ..
                 ' s over all attempts; its results so far are kept')
    end
  elseif rec.starts > 0 then
    local done, marked = calls_of(k)
    if #marked == 0 or count(done) + #marked < rec.total then return false end
    -- Nothing is left to run. The fence stays: the attempt that made the call may still tell the true outcome.
    end_unknown(k, rec, now, marked)
  else
    return false
  end
  return true
end

local function take(k, rec, now, token, worker, lease_ms)
  if rec.status == 'running' then
    rec.ran = stop_clock(rec, now)
    redis.call('HINCRBY', k.root .. ':totals', 'leases_lost', 1)
  end
  rec.fence, rec.starts = rec.fence + 1, rec.starts + 1
  move(k, rec, 'running')
  emit(k, rec, now, 'job.started', '{"worker":' .. cjson.encode(worker) .. ',"start":' .. rec.starts .. '}')
  redis.call('HSET', k.job, 'status', 'running', 'fence', rec.fence, 'token', token, 'worker', worker,
             'lease_until', now + lease_ms, 'starts', rec.starts, 'ran', rec.ran, 'run_from', now,
             'started', rec.started > 0 and rec.started or now, 'not_before', '0', 'seq', rec.seq,
             'wseq', '0')
  tell(k, rec)
end

-- claim(root; id, token, worker, lease_ms, published_at or '', max_starts, birth…): step 3. Answers
--   {'run', fence, retries, ms left, dead, 'c'|'f'|'m' .. call, …}    dead: '' or why it is to end as a dead letter
--   {'over', reason}                                                  ack; 'conflict': the message is of another job
--   {'later', ms, reason}                                             nak
local function claim(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local token, worker, lease_ms, max_starts = args[2], args[3], tonumber(args[4]), tonumber(args[6])
  local birth, published = birth_of(args, 7), tonumber(args[5]) or now
  local rec = load_record(k, CLAIM_FIELDS)
  if not rec then
    -- A record outlives its job by the TTL; a message that old without one may be a second life of an ended job.
    local stale = now - math.max(published + birth.delay, birth.run_at) > tonumber(birth.ttl)
    rec = make_record(k, birth, now, math.min(published, now))
    if stale then
      rec.stale = 1
      redis.call('HSET', k.job, 'stale', '1')
    end
  end
  -- While Redis was away an Idempotency-Key could not be compared: this message was accepted under the id of a job that
  -- had a different body, and whose own message was gone.
  if rec.hash and rec.hash ~= '' and birth.hash ~= '' and rec.hash ~= birth.hash then return { 'over', 'conflict' } end
  local generation = tonumber(birth.generation)
  if generation < rec.generation then return { 'over', 'superseded' } end
  if generation > rec.generation then
    -- Reopening writes the record before it publishes, so Redis has lost that write: the message tells the truth.
    drop_failed(k, rec)
    open_generation(k, rec, generation)
    move(k, rec, 'queued')
    redis.call('HSET', k.job, 'done', rec.done, 'failed', 0)
    redis.call('ZADD', k.due, now + lease_ms + GRACE_MS, k.id)
  end
  if TERMINAL[rec.status] then return { 'over', rec.status } end
  if rec.status == 'running' and rec.token == token then
    -- The answer was lost, and whoever asks again counts its lease from now.
    redis.call('HSET', k.job, 'lease_until', now + lease_ms)
    return granted(k, rec, max_starts)
  end
  if rec.status == 'running' and rec.lease_until > now then
    -- No lease lasts longer than one from now on, unless the clock was set back: the queue must not wait for that.
    return { 'later', math.min(rec.lease_until - now, lease_ms), 'held by another attempt' }
  end
  if rec.status == 'queued' and rec.not_before > now and not rec.cancel then
    return { 'later', rec.not_before - now, 'not due' }
  end
  if ends_at_claim(k, rec, now) then return { 'over', rec.status } end
  take(k, rec, now, token, worker, lease_ms)
  return granted(k, rec, max_starts)
end

redis.register_function('{prefix}_enqueue', enqueue)
redis.register_function('{prefix}_claim', claim)
